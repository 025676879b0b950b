"""ELA's Triton kernels, for both memory formats; `triton_op` launches them.

Strips (z, the gates, their gradients) are float32 tensors (N, C, H + W) that hold both strips of an image, one behind
the other: position h is row h, position H + w is column w. For a channels_last x, channels are contiguous in them too.

A kernel over feature maps has a program for each image and block of BC channels. It loops over blocks of BH rows as
wide as the whole map, so what belongs to columns stays in registers, and sums have one order: no atomics, and the same
bits on every run. It takes W as W / V and a constant V, so that it knows of rows that lie on vectors. A kernel over
strips has a program for each image, strip and GroupNorm group.
"""
import triton
import triton.language as tl


@triton.jit
def _strip(c, position, C, L, LAST: tl.constexpr):
    """Offset in one image's strips."""
    return position * C + c if LAST else c * L + position


@triton.jit
def _block(C, H, W, LAST: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """This program's image, channels, rows and columns, and the offsets of its first block of rows in the image."""
    blocks = tl.cdiv(C, BC)
    n = (tl.program_id(0) // blocks).to(tl.int64)  # a batch may hold more than 2^31 values
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)[None, None, :]
    h = tl.arange(0, BH)[:, None, None]
    w = tl.arange(0, BW)[None, :, None]
    return n, c, h, w, (h * W + w) * C + c if LAST else (c * H + h) * W + w


@triton.jit
def pool_kernel(
        x, z, C, H, W, V: tl.constexpr,
        LAST: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, STAGES: tl.constexpr):
    """z: means of x over its rows and over its columns, from one read."""
    W *= V
    n, c, h, w, at = _block(C, H, W, LAST, BC, BH, BW)
    x += n * C * H * W
    z += n * C * (H + W)
    columns = tl.zeros([1, BW, BC], tl.float32)
    for first in tl.range(0, H, BH, num_stages=STAGES):
        row = first + h
        values = tl.load(x + at, (c < C) & (row < H) & (w < W), 0).to(tl.float32)
        columns += tl.sum(values, 0, keep_dims=True)
        tl.store(z + _strip(c, row, C, H + W, LAST), tl.sum(values, 1, keep_dims=True) / W, (c < C) & (row < H))
        at += BH * W * C if LAST else BH * W
    tl.store(z + _strip(c, H + w, C, H + W, LAST), columns / H, (c < C) & (w < W))


@triton.jit
def gate_kernel(
        x, gates, y, C, H, W, V: tl.constexpr,
        LAST: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, STAGES: tl.constexpr):
    """y = x * a_h * a_w."""
    W *= V
    n, c, h, w, at = _block(C, H, W, LAST, BC, BH, BW)
    x += n * C * H * W
    y += n * C * H * W
    gates += n * C * (H + W)
    a_w = tl.load(gates + _strip(c, H + w, C, H + W, LAST), (c < C) & (w < W), 0)
    for first in tl.range(0, H, BH, num_stages=STAGES):
        row = first + h
        inside = (c < C) & (row < H) & (w < W)
        a_h = tl.load(gates + _strip(c, row, C, H + W, LAST), (c < C) & (row < H), 0)
        tl.store(y + at, (tl.load(x + at, inside, 0).to(tl.float32) * a_h * a_w).to(y.dtype.element_ty), inside)
        at += BH * W * C if LAST else BH * W


@triton.jit
def reduce_kernel(
        x, gates, dy, z, da, C, H, W, V: tl.constexpr,
        LAST: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, STAGES: tl.constexpr):
    """da: the gates' gradients, and z anew, from one read of x and dy."""
    W *= V
    n, c, h, w, at = _block(C, H, W, LAST, BC, BH, BW)
    x += n * C * H * W
    dy += n * C * H * W
    gates += n * C * (H + W)
    z += n * C * (H + W)
    da += n * C * (H + W)
    strip = _strip(c, H + w, C, H + W, LAST)
    a_w = tl.load(gates + strip, (c < C) & (w < W), 0)
    z_w = tl.zeros([1, BW, BC], tl.float32)
    da_w = tl.zeros([1, BW, BC], tl.float32)
    for first in tl.range(0, H, BH, num_stages=STAGES):
        row = first + h
        inside = (c < C) & (row < H)
        rows = _strip(c, row, C, H + W, LAST)
        a_h = tl.load(gates + rows, inside, 0)  # first, or the products take its layout, by way of shared memory
        values = tl.load(x + at, inside & (w < W), 0).to(tl.float32)
        products = tl.load(dy + at, inside & (w < W), 0).to(tl.float32) * values
        z_w += tl.sum(values, 0, keep_dims=True)
        da_w += tl.sum(products * a_h, 0, keep_dims=True)
        tl.store(z + rows, tl.sum(values, 1, keep_dims=True) / W, inside)
        tl.store(da + rows, tl.sum(products * a_w, 1, keep_dims=True), inside)
        at += BH * W * C if LAST else BH * W
    tl.store(z + strip, z_w / H, (c < C) & (w < W))
    tl.store(da + strip, da_w, (c < C) & (w < W))


@triton.jit
def expand_kernel(
        gates, dy, dz, dx, C, H, W, V: tl.constexpr,
        LAST: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, STAGES: tl.constexpr):
    """dx = dy * a_h * a_w + dz_h / W + dz_w / H."""
    W *= V
    n, c, h, w, at = _block(C, H, W, LAST, BC, BH, BW)
    dy += n * C * H * W
    dx += n * C * H * W
    gates += n * C * (H + W)
    dz += n * C * (H + W)
    strip = _strip(c, H + w, C, H + W, LAST)
    a_w = tl.load(gates + strip, (c < C) & (w < W), 0)
    dz_w = tl.load(dz + strip, (c < C) & (w < W), 0) / H
    for first in tl.range(0, H, BH, num_stages=STAGES):
        row = first + h
        inside = (c < C) & (row < H)
        rows = _strip(c, row, C, H + W, LAST)
        a_h = tl.load(gates + rows, inside, 0)
        dz_h = tl.load(dz + rows, inside, 0) / W
        value = tl.load(dy + at, inside & (w < W), 0).to(tl.float32) * a_h * a_w + (dz_h + dz_w)
        tl.store(dx + at, value.to(dx.dtype.element_ty), inside & (w < W))
        at += BH * W * C if LAST else BH * W


@triton.jit
def _group(C, H, W, groups, LAST: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr):
    """This program's image, channels (BC, 1) and positions (1, BL) in one strip, and that strip's first and length."""
    which = tl.program_id(0) % 2
    channel = tl.arange(0, BC)[:, None]
    size = C // groups
    n = (tl.program_id(0) // 2 // groups).to(tl.int64)
    c = tl.program_id(0) // 2 % groups * size + channel
    return n, c, channel < size, tl.arange(0, BL)[None, :], which * H, tl.where(which == 0, H, W), size


@triton.jit
def _normalized(
        z, conv, C, L, c, real, position, first, length, size, eps,
        LAST: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr):
    """The depthwise convolution of one group's strip, normalized, zero outside; and 1 / its standard deviation."""
    convolved = tl.zeros([BC, BL], tl.float32)
    for k in tl.static_range(K):
        source = position + (k - K // 2)
        inside = real & (source >= 0) & (source < length)
        convolved += (tl.load(conv + c * K + k, real, 0).to(tl.float32)
                      * tl.load(z + _strip(c, first + source, C, L, LAST), inside, 0))
    count = (size * length).to(tl.float32)
    inside = real & (position < length)
    convolved = tl.where(inside, convolved, 0)
    centred = tl.where(inside, convolved - tl.sum(tl.sum(convolved, 1), 0) / count, 0)
    rstd = tl.rsqrt(tl.sum(tl.sum(centred * centred, 1), 0) / count + eps)
    return centred * rstd, rstd


@triton.jit
def strip_kernel(
        z, conv, gamma, beta, gates, C, H, W, groups, eps,
        LAST: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr):
    """gates = sigmoid(GroupNorm(Conv1d(z))), the convolution depthwise."""
    n, c, real, position, first, length, size = _group(C, H, W, groups, LAST, BC, BL)
    z += n * C * (H + W)
    gates += n * C * (H + W)
    value, _ = _normalized(z, conv, C, H + W, c, real, position, first, length, size, eps, LAST, K, BC, BL)
    value = value * tl.load(gamma + c, real, 0).to(tl.float32) + tl.load(beta + c, real, 0).to(tl.float32)
    tl.store(
        gates + _strip(c, first + position, C, H + W, LAST), tl.sigmoid(value), real & (position < length))


@triton.jit
def strip_backward_kernel(
        z, conv, gamma, gates, da, dconv, dgamma, dbeta, C, H, W, groups, eps,
        LAST: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, BL: tl.constexpr):
    """Replaces z by its gradient; the gates' gradient da is used up.

    dconv (N, 2, C, K), dgamma and dbeta (N, 2, C) are the share of each image and strip in the parameters' gradients.
    """
    n, c, real, position, first, length, size = _group(C, H, W, groups, LAST, BC, BL)
    z += n * C * (H + W)
    gates += n * C * (H + W)
    da += n * C * (H + W)
    share = (n * 2 + tl.program_id(0) % 2) * C + c
    normed, rstd = _normalized(z, conv, C, H + W, c, real, position, first, length, size, eps, LAST, K, BC, BL)

    inside = real & (position < length)
    at = _strip(c, first + position, C, H + W, LAST)
    gate = tl.load(gates + at, inside, 0)
    grad = tl.load(da + at, inside, 0) * gate * (1 - gate)
    tl.store(dgamma + share, tl.sum(grad * normed, 1, keep_dims=True), real)
    tl.store(dbeta + share, tl.sum(grad, 1, keep_dims=True), real)
    grad *= tl.load(gamma + c, real, 0).to(tl.float32)
    count = (size * length).to(tl.float32)
    shift = tl.sum(tl.sum(grad, 1), 0) / count
    slope = tl.sum(tl.sum(grad * normed, 1), 0) / count
    grad = tl.where(inside, (grad - shift - normed * slope) * rstd, 0)
    for k in range(K):
        source = position + (k - K // 2)
        values = tl.load(
            z + _strip(c, first + source, C, H + W, LAST), real & (source >= 0) & (source < length), 0)
        tl.store(dconv + share * K + k, tl.sum(grad * values, 1, keep_dims=True), real)

    tl.store(da + at, grad, inside)
    tl.debug_barrier()  # the convolution's gradient needs its neighbours', which other threads wrote
    dz = tl.zeros([BC, BL], tl.float32)
    for k in range(K):
        source = position - (k - K // 2)
        values = tl.load(
            da + _strip(c, first + source, C, H + W, LAST), real & (source >= 0) & (source < length), 0)
        dz += tl.load(conv + c * K + k, real, 0).to(tl.float32) * values
    tl.store(z + at, dz, inside)
