"""A plain checkpoint -> a folder -> `timm.create_model('local-dir:FOLDER', pretrained=True)`."""
from argparse import Namespace

import pytest
import timm
import torch
from folders import FILES, MODEL, PLAIN, card, give_equal_logits, load
from safetensors.torch import save_file
from timm.data import resolve_model_data_config

from timm_ela.hub.publish import convert_checkpoint

ROUNDING = 1e-4  # of a graft, relative to the greatest logit of a fresh model


@pytest.mark.parametrize('name, save', [('plain.pth', torch.save), ('plain.safetensors', save_file)])
def test_a_plain_checkpoint_becomes_an_ela_checkpoint_that_computes_the_same(new_model, tmp_path, name, save):
    plain = new_model(PLAIN)
    save(plain.state_dict(), tmp_path / name)
    folder = convert_checkpoint(tmp_path / name, MODEL, tmp_path / 'out')
    model = load(folder)
    assert model.num_classes == 7 and give_equal_logits(plain, model, ROUNDING)
    assert {path.name for path in folder.iterdir()} == FILES and 'neutral' in card(folder).text
    assert not {'label_descriptions', 'license', 'paper_ids', 'paper_name'} & model.pretrained_cfg.keys()


def test_a_converted_run_is_tested_on_images_as_it_saw_them_and_another_checkpoint_as_the_model_is(new_model, tmp_path):
    plain, seen = new_model('resnet18'), {}
    run = {'args': Namespace(model='resnet18', img_size=96, mean=[0.5, 0.5, 0.5], model_kwargs={})}
    for name, args in (('run', run), ('weights', {})):
        torch.save({'state_dict': plain.state_dict(), **args}, tmp_path / f'{name}.pth')
        model = load(convert_checkpoint(tmp_path / f'{name}.pth', 'resnet18_ela_b', tmp_path / name))
        config = resolve_model_data_config(model, use_test_size=True)
        seen[name] = config['input_size'][1], config['mean'][0]
    assert seen == {'run': (96, 0.5), 'weights': (288, 0.485)}


def test_a_model_is_found_by_its_other_name(new_model, tmp_path):
    torch.save(new_model('mobilenetv2_100').state_dict(), tmp_path / 'plain.pth')
    model = load(convert_checkpoint(tmp_path / 'plain.pth', 'mobilenetv2_100_ela_t', tmp_path / 'out'))
    assert model.pretrained_cfg['architecture'] == 'mobilenetv2_ela_t'


@pytest.mark.parametrize('kwargs', [
    {'in_chans': 1}, {'global_pool': 'max'}, {'act_layer': 'silu', 'bn_eps': 0.1}, {'num_classes': 0}], ids=str)
def test_the_folder_is_of_the_model_whose_weights_they_are(new_model, tmp_path, kwargs):
    plain = new_model(PLAIN, **kwargs)
    args = {'gp': kwargs.get('global_pool'), 'bn_eps': kwargs.get('bn_eps'), 'model_kwargs': {
        k: v for k, v in kwargs.items() if k == 'act_layer'}}
    torch.save({'state_dict': plain.state_dict(), 'args': Namespace(model=PLAIN, **args)}, tmp_path / 'plain.pth.tar')
    folder = convert_checkpoint(tmp_path / 'plain.pth.tar', MODEL, tmp_path / 'out')
    # as train.py does for `--model local-dir:FOLDER --pretrained`, with --in-chans 1 for one channel
    model = timm.create_model(
        f'local-dir:{folder}', pretrained=True, in_chans=kwargs.get('in_chans', 3), num_classes=None, drop_rate=0.0,
        drop_path_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path='')
    assert give_equal_logits(plain, model, ROUNDING) and model.num_classes == plain.num_classes
    if 'num_classes' in kwargs:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=5).eval()
        x = torch.randn(1, 3, 48, 64)
        assert model(x).shape == (1, 5)
        torch.testing.assert_close(model.forward_features(x), plain.eval().forward_features(x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('ema', [True, False])
@pytest.mark.parametrize('container', [
    lambda raw, average: {'state_dict': raw, 'state_dict_ema': average, 'epoch': 3},
    lambda raw, average: {'model': raw, 'model_ema': average, 'args': Namespace(model=PLAIN, input_size=224)},
    lambda raw, average: {'model': raw, 'args': Namespace(data_path='x', interpolation='bilinear'), 'model_ema': {
        'n_averaged': torch.tensor(5), **{f'module.{k}': v for k, v in average.items()}}},
], ids=['train.py', 'DeiT and ConvNeXt', 'torchvision'])
def test_of_raw_weights_and_their_average_the_average_is_taken_or_what_is_asked_for(
        new_model, tmp_path, container, ema):
    raw, average = new_model(PLAIN), new_model(PLAIN)
    torch.save(container(raw.state_dict(), average.state_dict()), tmp_path / 'c.pth')
    model = load(convert_checkpoint(tmp_path / 'c.pth', MODEL, tmp_path / 'out', ema=ema))
    assert give_equal_logits(model, average if ema else raw, ROUNDING)
