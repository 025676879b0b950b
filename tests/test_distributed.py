"""DistributedDataParallel, in two processes, with each attention layer that is our own."""
import json

# timm's ResNets start with the last batch norm of a block at zero: nothing would reach the attention.
SMALL = dict(layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), zero_init_last=False)
OUR_LAYERS = [
    *((f'resnet18_{layer}', SMALL) for layer in ('ela_b', 'ela_s', 'sa', 'sp', 'triplet')),
    ('elsa_swin_tiny', dict(depths=(1, 1, 1, 1), embed_dim=24, img_size=(64, 96)))]
CODE = '''
import copy, json, os, sys
import timm, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

child = os.fork()
rank = int(child == 0)
dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}', rank=rank, world_size=2)
for name, kwargs in json.loads(sys.argv[2]):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).double().eval()  # batch statistics differ by rank
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    x, target = torch.randn(4, 3, 64, 96, dtype=torch.float64), torch.randint(5, (4,))

    alone = copy.deepcopy(model)
    torch.nn.functional.cross_entropy(alone(x), target).backward()
    together = DistributedDataParallel(model)
    part = slice(2 * rank, 2 * rank + 2)
    torch.nn.functional.cross_entropy(together(x[part]), target[part]).backward()
    for (key, p), q in zip(alone.named_parameters(), model.parameters()):
        assert q.grad.abs().sum() > 0, key
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-12, msg=lambda m: f'{name}, {key}: {m}')

dist.barrier()  # a process that leaves while the other one still talks to it makes gloo abort that one
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
'''


def test_gradients_are_those_of_one_process_on_the_joined_batch(forks, tmp_path):
    forks(CODE, tmp_path / 'store', json.dumps(OUR_LAYERS))
