"""`timm-ela plot`: what models make of a picture, as a figure or a file."""
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from timm import create_model
from timm.models import parse_model_name
from torch import nn

from .figure import draw, figure_class
from .observe import observe, open_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_attention(
        image: str | Path | Image.Image,
        model: nn.Module | Sequence[nn.Module],
        stages: Sequence[int] | None = None,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
        channel: int | None = None,
        *,
        mean: bool = False,
        class_index: int | None = None,
        titles: Sequence[str] | None = None,
) -> 'Figure':
    """Draws what a model makes of a picture: its most probable classes, Grad-CAM, and the gates of its ELA modules.

    The picture is what timm's evaluation transform makes of the image: grey, RGB or RGBA, as the model takes it.
    Grad-CAM shows which places speak for a class, at the last feature map that timm's `feature_info` names. One panel
    per stage shows the gate a_h * a_w of the stage's last ELA module as a map, with a_h and a_w along its edges. It is
    that of the channel whose gate varies most over the picture. All maps share a scale, which starts at 0. The last
    panel is the distribution of the gates of all channels: all are 0.25 in an untrained graft, which has a plain
    model's weights and an ELA that changes nothing. The model is left as it was.

    Args:
        image: Path of an image file, or a PIL image.
        model: timm model, with ELA modules or without; or several, drawn one below the other.
        stages: Stages to show, counted from 0 as timm's features; by default all with ELA.
        topk: Number of classes to show.
        class_names: One name per class; by default the checkpoint's, or ImageNet's for 1000 classes.
        channel: Channel to show in every stage, from 0; by default the one that varies most.
        mean: Show the mean over all channels.
        class_index: Class of the Grad-CAM; by default the most probable.
        titles: Title of each model; by default its architecture.

    Returns:
        The figure, which is not registered with pyplot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the image cannot be read, or not be converted to the model's channels; if the model has neither
            classes nor ELA, neither ELA nor a feature map that Grad-CAM can read, or lacks the stage, channel or class;
            or if class_names or titles have the wrong length.
    """
    figure_class()
    models = [model] if isinstance(model, nn.Module) else model
    if titles and len(titles) != len(models):
        raise ValueError(f'There are {len(models)} models, but {len(titles)} titles.')
    seen = [observe(image, one, stages, topk, class_names, channel, mean, class_index) for one in models]
    return draw(seen, titles or [one.model for one in seen])


def plot_file(
        image: str | Path,
        models: str | Sequence[str],
        output: str | Path,
        pretrained: bool = True,
        **kwargs: Any,
) -> None:
    """Writes what `plot_attention` draws for models by name. If anything fails, it writes nothing.

    Args:
        image: Path of an image file.
        models: One or several: names of timm models, or sources, 'hf-hub:owner/name' or 'local-dir:folder'.
        output: File to write; its suffix is the format.
        pretrained: Load pretrained weights. Those of a source are loaded in any case.
        **kwargs: Options of `plot_attention`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If the output cannot be written.
        RuntimeError: If timm does not know the model or has no weights for it.
        ValueError: As in `plot_attention`, if the output's suffix is not an image format, or if a model is a folder.
    """
    models, output = [models] if isinstance(models, str) else models, Path(output)
    # check all of the arguments before the models, which may be downloaded
    kind, kinds = output.suffix[1:].lower() or 'png', figure_class()().canvas.get_supported_filetypes()
    if kind not in kinds:
        raise ValueError(f'{str(output)!r}: format {kind!r} is not supported, only {", ".join(sorted(kinds))}.')
    if not output.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {output.parent} to write {output.name} into.')
    opened = open_image(image)
    sources = [parse_model_name(name)[0] for name in models]
    for name, source in zip(models, sources, strict=True):
        if source is None and Path(name).is_dir():
            raise ValueError(f'{name!r} is a folder, not a model name: give local-dir:{name}.')
    made = [create_model(name, pretrained=pretrained or source is not None)
            for name, source in zip(models, sources, strict=True)]
    rendered = BytesIO()
    plot_attention(opened, made, titles=models, **kwargs).savefig(rendered, format=kind, dpi=150)
    _write(output, rendered.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Replaces a file only when the new one is complete, since the disk may be full. Writes into a pipe or device."""
    if path.exists() and not path.is_file():
        path.write_bytes(data)
    else:
        partial = path.resolve().with_name(f'.{path.name}.{os.getpid()}')
        try:
            partial.write_bytes(data)
            partial.replace(path.resolve())
        finally:
            partial.unlink(missing_ok=True)
