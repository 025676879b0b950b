"""Enhanced Local Self-Attention (ELSA): the formula, the same computed by banded matrix products, and the module.

All maps are NHWC, as in timm's Swin. The operator is

    out[c, n] = sum over k of (mul[c, k] * h[g(c), k, n] + add[c, k]) * v[c, n + k]

h is the attention, which the C / G channels of a head share; `mul` and `add` are the ghost head. k runs over the K
offsets of a square neighbourhood, row by row, and v is zero outside the map. The term of `mul` is local attention, that
of `add` is a depthwise convolution of v. No tensor of size N x C x K x H x W is made.
"""
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .tracing import is_in_transform, is_tracing, runs_on_cpu

# one node in a traced graph, so that the choice between the computations is made when the graph runs
torch.fx.wrap('elsa')


def _tap(padded: Tensor, attn: Tensor, mul: Tensor | None, k: int, kernel_size: int) -> Tensor:
    """The summand of offset k, (N, H, W, G, C / G); padded is (N, H + 2r, W + 2r, G, C / G), mul (K, G, C / G)."""
    height, width = attn.shape[1], attn.shape[2]
    y, x = k // kernel_size, k % kernel_size
    value = padded[:, y:y + height, x:x + width]
    if mul is not None:
        value = value * mul[k]
    return value * attn[..., k:k + 1]


def local_attention(v: Tensor, attn: Tensor, mul: Tensor | None, kernel_size: int) -> Tensor:
    """Computes local attention by its formula: for a ghost head's `mul`, and as the test of `banded_attention`.

    With `mul`, `banded_attention` would need a matrix for each channel, not for each head, and use it for one vector.

    Args:
        v: Values (N, H, W, C).
        attn: Weights (N, H, W, G, K) of K = kernel_size ** 2 offsets for each of G heads.
        mul: Factor of the weights, (C, kernel_size, kernel_size), or None for 1.
        kernel_size: Offsets along a side, odd.

    Returns:
        The sum over k of mul[c, k] * attn[g(c), k, n] * v[c, n + k], (N, H, W, C) in v's dtype.
    """
    reach = kernel_size // 2
    padded = F.pad(v, (0, 0, reach, reach, reach, reach)).unflatten(3, (attn.shape[3], -1))
    if mul is not None:
        mul = mul.flatten(1).t().unflatten(1, (attn.shape[3], -1))
    # in a low precision, the sum would round at each offset
    out = torch.zeros(1, device=v.device, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32)
    for k in range(kernel_size * kernel_size):
        if torch.jit.is_scripting():
            out = out + _tap(padded, attn, mul, k, kernel_size)
        else:
            out = out + _recomputed(_tap, padded, attn, mul, k, kernel_size)
    return out.flatten(3).to(v.dtype)


def _recomputed(function: Callable[..., Tensor], *args) -> Tensor:
    """Calls the function. In eager mode with gradients, it keeps the arguments only, and calls it again in backward."""
    # traces, torch.func and forward-mode derivatives need the operations themselves
    if not torch.is_grad_enabled() or is_tracing() or is_in_transform():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _skew(x: Tensor, length: int) -> Tensor:
    """Shifts row i of x (..., rows, S, M) by i places along axis S, and returns (..., rows, length, M).

    It pads the rows to length + 1, joins them, and cuts the result into rows of `length`, each of which starts one
    place later than the row before.
    """
    rows = x.shape[-3]
    x = F.pad(x, (0, 0, 0, length + 1 - x.shape[-2])).flatten(-3, -2)
    return x[..., :rows * length, :].unflatten(-2, (rows, length))


def banded_attention(v: Tensor, attn: Tensor, kernel_size: int, tile: int = 7) -> Tensor:
    """Computes `local_attention` without `mul`, by one batch of matrix products: two dozen operations for any kernel.

    The queries of a square tile share their keys: the tile and a margin around it. Each row of a matrix (queries, keys)
    holds a query's weights, and zeros for the keys out of its reach. Tiles of 7 x 7 fill the maps of Swin at 224
    pixels; other maps are padded.

    Args:
        v, attn, kernel_size: As in `local_attention`.
        tile: Height and width of a tile.

    Returns:
        As `local_attention`, (N, H, W, C).
    """
    height, width, channels = v.shape[1:]
    heads, reach = attn.shape[3], kernel_size // 2
    side = tile + 2 * reach
    rows, cols = -(-height // tile), -(-width // tile)
    margin = (0, 0, 0, cols * tile - width, 0, rows * tile - height)
    v, attn = F.pad(v, margin), F.pad(attn.flatten(3), margin)

    keys = F.pad(v, (0, 0, reach, reach, reach, reach)).unfold(1, side, tile).unfold(2, side, tile)
    keys = keys.unflatten(3, (heads, -1)).permute(0, 1, 2, 3, 5, 6, 4)  # (N, rows, cols, G, side, side, C / G)
    keys = keys.reshape(-1, side * side, channels // heads)
    band = attn.reshape(-1, rows, tile, cols, tile, heads, kernel_size, kernel_size)
    band = band.permute(0, 1, 3, 5, 2, 6, 4, 7)  # (N, rows, cols, G, tile, kernel_size, tile, kernel_size)
    band = _skew(band.unsqueeze(-1), side).squeeze(-1)  # (N, rows, cols, G, tile, kernel_size, tile, side)
    # from here on, the queries of a tile follow one another column by column
    band = _skew(band.movedim(-2, -4), side).reshape(-1, tile * tile, side * side)
    out = torch.bmm(band, keys).reshape(-1, rows, cols, heads, tile, tile, channels // heads)
    out = out.permute(0, 1, 5, 2, 4, 3, 6)  # (N, rows, tile, cols, tile, G, C / G)
    return out.reshape(-1, rows * tile, cols * tile, channels)[:, :height, :width]


def _banded_by_images(v: Tensor, attn: Tensor, kernel_size: int) -> Tensor:
    """Computes `banded_attention` of some images at a time, so that only their matrices are in memory."""
    if is_tracing() or is_in_transform():
        return banded_attention(v, attn, kernel_size)
    # on a CPU, the matrices of one image stay in its caches
    step = 1 if runs_on_cpu(v) else 32
    return torch.cat([
        _recomputed(banded_attention, *images, kernel_size)
        for images in zip(v.split(step), attn.split(step), strict=True)])


def elsa(v: Tensor, attn: Tensor, mul: Tensor | None, add: Tensor | None, kernel_size: int) -> Tensor:
    """The operator of ELSA: local attention and a ghost head.

    In eager mode it keeps nothing for the backward pass but its arguments. Compiled, scripted or exported, it computes
    the whole batch at once, and each operation keeps what it needs.

    Args:
        v, attn, mul, kernel_size: As in `local_attention`; v may have any strides.
        add: Summand of the weights, (C, kernel_size, kernel_size), or None for 0.

    Returns:
        The map (N, H, W, C) in v's dtype.
    """
    # under autocast, softmax returns float32
    dtype, attn, v = v.dtype, attn.to(v.dtype), v.contiguous()
    if mul is not None:
        out = local_attention(v, attn, mul, kernel_size)
    elif torch.jit.is_scripting():
        out = banded_attention(v, attn, kernel_size)
    else:
        out = _banded_by_images(v, attn, kernel_size)
    if add is not None:
        v, reach = v.permute(0, 3, 1, 2), kernel_size // 2
        ghost = F.conv2d(v, add.unsqueeze(1), None, 1, [reach, reach], 1, v.shape[1])
        out = out + ghost.permute(0, 2, 3, 1)
    return out.to(dtype)


class _ConvNHWC(nn.Conv2d):
    """Conv2d of an NHWC map. A 1 x 1 convolution is computed as a matrix product, which is faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1):
            return F.linear(x, self.weight.flatten(1), self.bias)
        return self._conv_forward(x.permute(0, 3, 1, 2), self.weight, self.bias).permute(0, 2, 3, 1)


class EnhancedLocalSelfAttention(nn.Module):
    """Enhanced Local Self-Attention: Hadamard attention in a square around each position, and a ghost head.

    For an NHWC map x of C channels, with d channels of queries and keys and K = kernel_size ** 2::

        q, k, v = 1x1 convolution of x                                        widths d, d, C
        h = softmax over K of conv1x1(GELU(grouped conv(q * k * scale)))      num_heads * K channels
        out[c, n] = sum over k of (mul[c, k] ** lam * h[g(c), k, n] + gamma * add[c, k]) * v[c, n + k]
        y = Linear(out)

    d is C // 3 * 2, rounded up to a multiple of group_width. Parameters have the authors' names and shapes, so the
    weights of their modules load unchanged: `ghost_head` is (1, C, kernel_size, kernel_size) if lam or gamma is 0, and
    else (2, 1, C, kernel_size, kernel_size), with `mul` first. The authors' options for a stride, a dilation, other
    widths of q, k and v, and a grouped last convolution are left out: none of their models uses them.

    With lam = 0, as in all released models, local attention is computed by matrix products. With another lam it is the
    sum of K maps, which takes longer (weights_cards/studies/speed.md).

    Source: `ELSA: Enhanced Local Self-Attention for Vision Transformer` - https://arxiv.org/abs/2112.12786
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            kernel_size: int = 5,
            *,
            qkv_bias: bool = False,
            qk_scale: float | None = None,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            group_width: int = 8,
            lam: float = 1.,
            gamma: float = 1.,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            dim: Channels C of the input.
            num_heads: Heads; C is a multiple of it.
            kernel_size: Positions along a side of the square, odd.
            qkv_bias: If True, the first convolution has a bias.
            qk_scale: Scale of q * k; by default (C / num_heads) ** -0.5. ELSA-Swin has 1.
            attn_drop: Dropout rate of h.
            proj_drop: Dropout rate of the output.
            group_width: Channels per group of the grouped convolution.
            lam: Exponent of the ghost head's `mul`, an integer; 0 leaves it out.
            gamma: Factor of the ghost head's `add`; 0 leaves it out.
            device, dtype: Device and dtype of the parameters.

        Raises:
            ValueError: If kernel_size is even or not positive, lam is no integer, or dim is no multiple of num_heads.
        """
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'ELSA needs a positive odd kernel_size, got {kernel_size}.')
        if lam % 1:
            raise ValueError(f'ELSA needs an integer lam, got {lam}: other powers of negative numbers are NaN.')
        if dim % num_heads:
            raise ValueError(f'ELSA needs a dim that is a multiple of num_heads={num_heads}, got {dim}.')
        dd = {'device': device, 'dtype': dtype}
        dim_qk = math.ceil(dim // 3 * 2 / group_width) * group_width
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.scale = float(qk_scale or (dim // num_heads) ** -0.5)
        self.lam, self.gamma = float(lam), float(gamma)
        self.widths = [dim_qk, dim_qk, dim]

        self.pre_proj = _ConvNHWC(dim, sum(self.widths), 1, bias=qkv_bias, **dd)
        self.attn = nn.Sequential(
            _ConvNHWC(dim_qk, dim_qk, kernel_size, padding=kernel_size // 2, groups=dim_qk // group_width, **dd),
            nn.GELU(),
            _ConvNHWC(dim_qk, kernel_size ** 2 * num_heads, 1, **dd),
        )
        shape = (dim, kernel_size, kernel_size)
        parts = (lam != 0) + (gamma != 0)
        self.ghost_head = None
        if parts:
            self.ghost_head = nn.Parameter(torch.empty((2, 1, *shape) if parts == 2 else (1, *shape), **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        self.post_proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the ghost head as the authors do."""
        mul, add = self._ghost_head()
        with torch.no_grad():
            if mul is not None:
                mul.normal_()
            if add is not None:
                trunc_normal_(add, std=.02)

    def _ghost_head(self) -> tuple[Tensor | None, Tensor | None]:
        """The views `mul` and `add` (C, kernel_size, kernel_size) of the ghost head, None where they are left out."""
        head = self.ghost_head
        if head is None:
            return None, None
        parts = head.flatten(0, -4)  # (1 or 2, C, kernel_size, kernel_size)
        return parts[0] if self.lam != 0 else None, parts[-1] if self.gamma != 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (N, H, W, C), of any height and width, to the same shape."""
        q, k, v = self.pre_proj(x).split(self.widths, 3)
        attn = self.attn(q * k if self.scale == 1 else q * k * self.scale)
        attn = self.attn_drop(attn.unflatten(3, (self.num_heads, -1)).softmax(4))
        mul, add = self._ghost_head()
        if mul is not None:
            mul = mul ** self.lam
        if add is not None:
            add = add * self.gamma
        return self.proj_drop(self.post_proj(elsa(v, attn, mul, add, self.kernel_size)))


def elsa_in_place_of(
        attn: nn.Module, qkv_bias: bool, weight_init: str = '', **options: Any) -> EnhancedLocalSelfAttention:
    """Makes ELSA, with scale 1, of another attention's width, heads, dropout rates, device and dtype.

    `attn` is a timm model's, with `num_heads`, `proj`, `attn_drop` and `proj_drop`. `weight_init` is that of timm's
    vision transformers, and 'skip' leaves PyTorch's. The options are kernel_size, group_width, lam and gamma.
    """
    layer = EnhancedLocalSelfAttention(
        attn.proj.out_features,
        attn.num_heads,
        qkv_bias=qkv_bias,
        qk_scale=1,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        device=attn.proj.weight.device,
        dtype=attn.proj.weight.dtype,
        **options,
    )
    if weight_init != 'skip':
        named_apply(get_init_weights_vit(weight_init, needs_reset=False), layer)
    return layer
