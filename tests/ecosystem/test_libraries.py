"""Libraries that take a timm model: for detection, segmentation, training, Grad-CAM; and FSDP."""
from importlib.util import find_spec

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_ela.observe import observe

EXTRA = "needs pip install '.[ecosystem]'"


# found, not imported: an import writes settings into the home folder
@pytest.mark.skipif(find_spec('ultralytics') is None, reason=EXTRA)
@pytest.mark.parametrize(('title', 'trained'), {
    'YOLO with a backbone by its name': '''
        grafted = timm.create_model('mobilenetv2_ela_b', pretrained=True, features_only=True).state_dict()
        before = YOLO('yolo26n-timm.yaml').model.model[0].state_dict()
        assert all(torch.equal(p, grafted[k]) for k, p in before.items() if '.se.conv.' not in k)
        after = model.model.model[0].state_dict()
        gates = [k for k in before if '.se.gn.' in k]
        assert len(gates) == 2 * 16
        assert not any(before[k].any() for k in gates) and all(after[k].any() for k in gates)
    ''',
    'YOLO with ELA as a row': '''
        layers = model.model.model[23:26]
        assert all(isinstance(m, EfficientLocalAttention) and m.gn.bias.abs().min() > 0 for m in layers)

        plain = YOLO('yolo26n.yaml')
        plain.save('yolo26n.pt')
        weights = YOLO('yolo26n-ela.yaml').load('yolo26n.pt').model.state_dict()
        for k, p in plain.model.state_dict().items():
            assert k.startswith('model.23.') or torch.equal(weights[k], p.half().float()), k
    ''',
}.items())
def test_ultralytics_yolo(execute, tmp_path, title, trained):
    rng = np.random.default_rng(0)
    for part, count in (('train', 8), ('val', 4)):
        for i in range(count):
            pixels, boxes = rng.integers(0, 60, (96, 96, 3), np.uint8), []
            for channel, (x, y) in enumerate(rng.integers(0, 64, (3, 2))):
                pixels[y:y + 32, x:x + 32, channel] = 255
                boxes.append(f'{channel} {(x + 16) / 96} {(y + 16) / 96} {1 / 3} {1 / 3}')
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / part / f'{i}.png')
            (tmp_path / part / f'{i}.txt').write_text('\n'.join(boxes))
    (tmp_path / 'my-data.yaml').write_text(
        f'path: {tmp_path}\ntrain: train\nval: val\nnames: [red, green, blue]')
    # Ultralytics takes the git checkout that it is installed in for its own
    execute(f'from ultralytics import settings; settings.update(runs_dir={str(tmp_path / "runs")!r})')
    execute(trained, title)
    execute('''
        from onnxruntime import InferenceSession
        from ultralytics import YOLO

        model = YOLO('runs/detect/train/weights/best.pt')
        x = torch.rand(1, 3, 96, 96)
        expected = model.model.eval()(x)[0]
        session = InferenceSession(model.export(format='onnx', imgsz=96), providers=['CPUExecutionProvider'])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert y.shape == (1, 4 + 3, 12 ** 2 + 6 ** 2 + 3 ** 2)
        # without ELA, boxes move by 2e-3
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=0, atol=3e-4)
    ''')


def test_segmentation_models_pytorch(execute):
    pytest.importorskip('segmentation_models_pytorch', reason=EXTRA)
    execute('''
        x, target = torch.rand(2, 3, 96, 160), torch.randint(3, (2, 96, 160))
        unet.eval(), deeplab.eval()
        assert torch.equal(unet(x), smp.from_pretrained('my-unet').eval()(x))
        for model in (unet, deeplab):
            model.train()
            masks = model(x)
            torch.nn.functional.cross_entropy(masks, target).backward()
            gates = [p for name, p in model.named_parameters() if '.se.gn.' in name]
            assert len(gates) == 2 * 16
            assert all(p.grad.abs().sum() > 0 for p in gates)
    ''', 'segmentation_models_pytorch')


@pytest.mark.parametrize(('title', 'detectors', 'part', 'count'), [
    ('torchvision detection', 'rcnn, retinanet', '.se.gn.', 2 * 16),
    ('torchvision detection on ELSA-Swin', 'elsa,', '.ghost_head', 10)])
def test_torchvision_detection(execute, title, detectors, part, count):
    pytest.importorskip('torchvision', reason=EXTRA)
    execute(f'''
        images = [torch.rand(3, 120, 160), torch.rand(3, 150, 110)]
        targets = [
            dict(boxes=torch.tensor([[10.0, 20, 60, 80]]), labels=torch.tensor([1])),
            dict(boxes=torch.tensor([[5.0, 5, 50, 90], [30, 40, 100, 140]]), labels=torch.tensor([1, 2])),
        ]
        for model in ({detectors}):
            model.transform.min_size, model.transform.max_size = (96,), 160
            sum(model(images, targets).values()).backward()
            gates = [p for name, p in model.named_parameters() if '{part}' in name]
            assert len(gates) == {count}
            assert all(p.grad.abs().sum() > 0 for p in gates)
    ''', title)


def test_effdet(execute):
    pytest.importorskip('effdet', reason=EXTRA)
    execute('''
        import timm
        grafted = timm.create_model('mobilenetv2_ela_b', pretrained=True, features_only=True).state_dict()
        assert all(torch.equal(p, grafted[k]) for k, p in model.backbone.state_dict().items() if '.se.conv.' not in k)

        images = torch.rand(2, 3, 256, 256)
        boxes = torch.tensor([[[10.0, 20, 120, 140]], [[0, 0, 60, 60]]])
        train(images, {'bbox': boxes, 'cls': torch.tensor([[1.0], [3]])})['loss'].backward()
        gates = [p for name, p in model.named_parameters() if '.se.gn.' in name]
        assert len(gates) == 2 * 16
        assert all(p.grad.abs().sum() > 0 for p in gates)
    ''', 'effdet')


def test_transformers(execute, write_my_model):
    pytest.importorskip('transformers', reason=EXTRA)
    write_my_model()
    execute('''
        import numpy, timm
        from PIL import Image

        reference = timm.create_model('local-dir:my-model', pretrained=True).eval()
        x = torch.rand(2, 3, 96, 128)
        assert torch.equal(model.eval()(x).logits, reference(x))
        assert model.config.id2label == {0: 'ant', 1: 'bee', 2: 'cat'}

        image = Image.fromarray(numpy.random.RandomState(0).randint(0, 256, (150, 200, 3), numpy.uint8))
        data = timm.data.resolve_model_data_config(reference)
        pixels = processor(image)['pixel_values']
        assert torch.equal(pixels, timm.data.create_transform(**data)(image)[None])
        top = classify(image)
        expected = reference(pixels).softmax(1)[0]
        assert [t['label'] for t in top] == [('ant', 'bee', 'cat')[i] for i in expected.argsort(descending=True)]

        for name, loaded in (('resnet50_ela_b', backbone), ('local-dir:my-model', my_backbone)):
            features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
            maps = loaded.eval()(x).feature_maps
            assert all(torch.equal(*pair) for pair in zip(maps, features(x), strict=True))
    ''', 'transformers')


@pytest.mark.parametrize('name', ['resnet18_sa', 'resnet18_ela_s'])
def test_libraries_that_compare_the_shapes_of_weights_load_every_layer(execute, write_my_model, name):
    pytest.importorskip('accelerate', reason=EXTRA)
    write_my_model(name)
    execute('''
        import timm
        from accelerate import load_checkpoint_and_dispatch
        from transformers import AutoModelForImageClassification
        reference, x = timm.create_model('local-dir:my-model', pretrained=True).eval(), torch.rand(2, 3, 96, 128)
        model = AutoModelForImageClassification.from_pretrained('my-model').eval()
        assert torch.equal(model(x).logits, reference(x))
        empty = timm.create_model('local-dir:my-model', exportable=True).eval()
        loaded = load_checkpoint_and_dispatch(empty, 'my-model/model.safetensors', device_map={'': 'cpu'})
        torch.testing.assert_close(loaded(x), reference(x))
    ''')


def test_transformers_trainer(execute, write_my_model):
    pytest.importorskip('accelerate', reason=EXTRA)
    write_my_model()
    execute('''
        import timm

        before = timm.create_model('local-dir:my-model', pretrained=True).state_dict()
        after = model.timm_model.state_dict()
        moved = [k for k in before if '.se.' in k and not torch.equal(before[k], after[k].cpu())]
        assert len(moved) == 3 * 8
        x = torch.rand(2, 3, 96, 128)
        logits = model.cpu().eval()(x).logits
        assert torch.equal(AutoModelForImageClassification.from_pretrained('my-finetuned').eval()(x).logits, logits)
        assert torch.equal(timm.create_model('local-dir:my-finetuned', pretrained=True).eval()(x), logits)
    ''', 'transformers\' Trainer')


def test_fastai(execute, tmp_path):
    pytest.importorskip('fastai', reason=EXTRA)
    rng = np.random.default_rng(0)
    for name in ('ant', 'bee'):
        (tmp_path / 'my-images' / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (96, 96, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'my-images' / name / f'{i}.png')
    (prediction,) = execute('''
        import timm
        before = timm.create_model('mobilenetv2_ela_b', pretrained=True, num_classes=0).state_dict()
        after = learner.model[0].model.state_dict()
        assert before.keys() == after.keys()
        assert sum('.se.' in k and not torch.equal(before[k], after[k]) for k in before) == 3 * 16
        print(learner.predict('my-images/bee/0.png'))
    ''', 'fastai')[-1:]
    assert execute('''
        from fastai.vision.all import load_learner
        print(load_learner('my-images/my-learner.pkl').predict('my-images/bee/0.png'))
    ''')[-1] == prediction


def test_accelerate(execute, write_my_model):
    pytest.importorskip('accelerate', reason=EXTRA)
    write_my_model()
    execute('''
        assert accelerator.num_processes == 2
        before = timm.create_model('local-dir:my-model', pretrained=True).state_dict()
        assert weights.keys() == before.keys()
        assert sum('.se.' in k and not torch.equal(before[k], weights[k]) for k in before) == 3 * 8
        accelerator.end_training()
    ''', 'accelerate', processes=2)


def test_pytorchs_fsdp(execute, write_my_model):
    """Both processes take the same images, so that the mean of their gradients is that of one."""
    write_my_model()
    execute('''
        alone = timm.create_model('local-dir:my-model', pretrained=True)
        x, target = torch.rand(4, 3, 96, 128), torch.tensor([0, 1, 2, 0])
        for network in (alone, model):
            torch.nn.functional.cross_entropy(network(x), target).backward()
        for (key, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            assert q.to_local().shape != q.shape
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-5, msg=key)
        torch.distributed.destroy_process_group()
    ''', 'PyTorch\'s FSDP', processes=2)


def test_grad_cam(execute, write_my_model):
    pytest.importorskip('pytorch_grad_cam', reason=EXTRA)
    write_my_model()
    execute('''
        assert last.shape == behind_attention.shape == (1, 96, 128)
        assert last.max() > 0.99 and behind_attention.max() > 0.99 and abs(last - behind_attention).max() > 0.01
        assert not model.layer4._forward_hooks
    ''', 'grad-cam')


@pytest.mark.parametrize('name', ['resnet50', 'tf_efficientnet_lite0_ela_b', 'elsa_swin_tiny'])
def test_our_grad_cam_is_that_of_grad_cam(randomize, image, name):
    grad_cam = pytest.importorskip('pytorch_grad_cam', reason=EXTRA)
    model = randomize(timm.create_model(name, num_classes=3)).eval()
    x = create_transform(**resolve_model_data_config(model))(image)[None]
    nhwc = dict(reshape_transform=lambda t: t.permute(0, 3, 1, 2)) if 'swin' in name else {}
    found = []
    with grad_cam.GradCAM(model, [model.get_submodule(model.feature_info[-1]['module'])], **nhwc) as cam:
        for i in range(3):
            expected = cam(x, [lambda logits, i=i: logits[i]])[0]
            found.append(observe(image, model, class_index=i).cam)
            np.testing.assert_allclose(found[-1], expected, rtol=0, atol=1e-5)
    assert max(cam.max() for cam in found) == 1
