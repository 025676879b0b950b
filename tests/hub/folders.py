"""Folders that `timm-ela export` and `convert` wrote, and what is read from them."""
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest
FILES = {'model.safetensors', 'config.json', 'README.md'}  # of a converted checkpoint; a run has args.yaml as well
TRAINED = {'top1': 70.5, 'top5': 95.25}  # what write_run measured on model_best.pth.tar


def load(folder: Path) -> nn.Module:
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def have_equal_weights(model: nn.Module, other: nn.Module) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def give_equal_logits(model: nn.Module, other: nn.Module, tolerance: float = 0) -> bool:
    channels = next(model.parameters()).shape[1]  # of the first convolution
    x = torch.randn(2, channels, 48, 64)
    with torch.no_grad():
        logits = model.eval()(x)
        return bool((other.eval()(x) - logits).abs().max() <= tolerance * logits.abs().max())


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / 'README.md')


def metrics(folder: Path) -> dict[str, float]:
    return {r.metric_name[:5].replace('-', '').lower(): r.metric_value for r in card(folder).data.eval_results or []}
