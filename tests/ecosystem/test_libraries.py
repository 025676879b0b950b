"""Libraries that take a timm model: for detection, segmentation, training, Grad-CAM; and FSDP."""
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

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

        config['head'][-2][3][1] = "'t'"
        YAML.save('yolo26n-ela-t.yaml', config)
        assert YOLO('yolo26n-ela-t.yaml').model.model[25].conv.kernel_size == (5,)
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
        try:
            model.train(data='my-data.yaml', epochs=1, imgsz=96)
        except KeyError as error:
            assert error.args[0] in ('TimmFeatures', 'EfficientLocalAttention')
        else:
            raise AssertionError('trains without the name in ultralytics.nn.tasks')
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
            assert masks.shape == (2, 3, 96, 160)
            torch.nn.functional.cross_entropy(masks, target).backward()
            gates = [p for name, p in model.named_parameters() if '.se.gn.' in name]
            assert len(gates) == 2 * 16
            assert all(p.grad.abs().sum() > 0 for p in gates)

        for stride in (8, 16, 32):
            encoder = smp.encoders.get_encoder('tu-mobilenetv2_ela_t', weights=None, output_stride=stride)
            assert encoder(x)[-1].shape[2:] == (96 // stride, 160 // stride)
    ''', 'segmentation_models_pytorch')


def test_torchvision_detection(execute):
    pytest.importorskip('torchvision', reason=EXTRA)
    execute('''
        images = [torch.rand(3, 120, 160), torch.rand(3, 150, 110)]
        targets = [
            {'boxes': torch.tensor([[10.0, 20, 60, 80]]), 'labels': torch.tensor([1])},
            {'boxes': torch.tensor([[5.0, 5, 50, 90], [30, 40, 100, 140]]), 'labels': torch.tensor([1, 2])},
        ]
        kwargs = dict(num_classes=3, min_size=96, max_size=160)
        swapped = [
            FasterRCNN(Backbone('mobilenetv2_ela_t'), rpn_anchor_generator=anchors, **kwargs),
            RetinaNet(Backbone('resnet50_ela_b'), anchor_generator=anchors, **kwargs),
        ]
        for model in (rcnn, retinanet, *swapped):
            model.transform.min_size, model.transform.max_size = (96,), 160
            sum(model(images, targets).values()).backward()
            gates = [p for name, p in model.named_parameters() if '.se.gn.' in name]
            assert len(gates) == 2 * 16
            assert all(p.grad.abs().sum() > 0 for p in gates)
            model.eval()
            with torch.no_grad():
                found = model(images)
            assert len(found) == 2
            assert all(f['boxes'].shape == (len(f['scores']), 4) for f in found)
    ''', 'torchvision detection')


def test_torchvision_detection_on_elsa_swin(execute):
    pytest.importorskip('torchvision', reason=EXTRA)
    execute('''
        import torch
        images = [torch.rand(3, 120, 160), torch.rand(3, 150, 110)]
        targets = [
            {'boxes': torch.tensor([[10.0, 20, 60, 80]]), 'labels': torch.tensor([1])},
            {'boxes': torch.tensor([[5.0, 5, 50, 90]]), 'labels': torch.tensor([2])},
        ]
        elsa.transform.min_size, elsa.transform.max_size = (96,), 160
        sum(elsa(images, targets).values()).backward()
        ghosts = [p for name, p in elsa.named_parameters() if name.endswith('ghost_head')]
        assert len(ghosts) == 10
        assert all(p.grad.abs().sum() > 0 for p in ghosts)
        elsa.eval()
        with torch.no_grad():
            assert all(f['boxes'].shape == (len(f['scores']), 4) for f in elsa(images))
    ''', 'torchvision detection on ELSA-Swin')


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
        with torch.no_grad():
            found = predict.eval()(images)
        assert found.shape == (2, 100, 6) and found.isfinite().all()
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
        assert data['input_size'] == (3, 96, 96)
        pixels = processor(image)['pixel_values']
        assert torch.equal(pixels, timm.data.create_transform(**data)(image)[None])
        top = classify(image)
        expected = reference(pixels).softmax(1)[0]
        assert [t['label'] for t in top] == [('ant', 'bee', 'cat')[i] for i in expected.argsort(descending=True)]
        assert abs(top[0]['score'] - expected.max().item()) < 1e-5

        for name, loaded in (('resnet50_ela_b', backbone), ('local-dir:my-model', my_backbone)):
            features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
            maps = loaded.eval()(x).feature_maps
            assert len(maps) == 4
            assert all(torch.equal(*pair) for pair in zip(maps, features(x)))
        loss = model.train()(x, labels=torch.tensor([0, 2])).loss
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    ''', 'transformers')


def test_libraries_that_compare_the_shapes_of_weights_load_every_layer(execute, write_my_model):
    pytest.importorskip('accelerate', reason=EXTRA)
    for name in ('resnet18_sa', 'resnet18_ela_s'):
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


def test_what_transformers_cannot_do_with_a_backbone_it_cannot_do_with_plain_timm_models(execute, write_my_model):
    pytest.importorskip('transformers', reason=EXTRA)
    outcomes = []
    for name in ('resnet18', 'resnet18_ela_b'):
        write_my_model(name)
        outcomes.append(execute('''
            import timm
            from transformers import AutoBackbone, TimmBackbone
            for source in ('./my-model', 'local-dir:my-model'):
                try:
                    AutoBackbone.from_pretrained(source)
                except Exception as error:
                    print(source, type(error).__name__, error)
                else:
                    print(source, 'loads')
            features = timm.create_model('local-dir:my-model', pretrained=True, features_only=True).state_dict()
            backbone = TimmBackbone.from_pretrained('local-dir:my-model', out_indices=(0, 1, 2, 3, 4))
            loaded = backbone._backbone.state_dict()
            changed = {k.rpartition('.')[2] for k in features if not torch.equal(features[k], loaded[k])}
            print('changed by from_pretrained:', *sorted(changed))
        '''))
    print(*outcomes[0], sep='\n')
    assert outcomes[0] == outcomes[1]


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
        assert logits.shape == (2, 10)
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
        import numpy
        from PIL import Image
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        from timm.data import create_transform, resolve_model_data_config
        from timm_ela.observe import observe

        assert last.shape == behind_attention.shape == (1, 96, 128)
        assert last.max() > 0.99 and behind_attention.max() > 0.99 and abs(last - behind_attention).max() > 0.01
        assert not model.layer4._forward_hooks

        # the oracle of our own Grad-CAM
        image = Image.fromarray(numpy.random.RandomState(0).randint(0, 256, (15, 20, 3), numpy.uint8))
        for name in ('resnet50', 'mobilenetv2_100', 'tf_efficientnet_lite0_ela_b', 'elsa_swin_tiny'):
            model = timm.create_model(name, num_classes=3)
            for m in model.modules():
                if isinstance(m, torch.nn.BatchNorm2d):
                    m.momentum = 1  # the statistics of one batch keep the signal alive
                    torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            config = resolve_model_data_config(model)
            x = create_transform(**config)(image.resize((500, 400)))[None]
            with torch.no_grad():
                model.train()(x + torch.randn(2, *x.shape[1:]))
            nhwc = dict(reshape_transform=lambda t: t.permute(0, 3, 1, 2)) if 'swin' in name else {}
            layer = model.get_submodule(model.feature_info[-1]['module'])
            found = []
            with GradCAM(model.eval(), [layer], **nhwc) as cam:
                for i in range(3):
                    expected = cam(x, [ClassifierOutputTarget(i)])[0]
                    found.append(observe(image.resize((500, 400)), model, class_index=i).cam)
                    assert abs(found[-1] - expected).max() < 1e-5, (name, i)
            assert max(cam.max() for cam in found) == 1
    ''', 'grad-cam')
