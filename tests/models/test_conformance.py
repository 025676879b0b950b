"""timm's own model tests pass on a backbone of each kind; `make conformance` runs them on all models."""
import sys
from collections import defaultdict
from xml.etree import ElementTree

import conformance
import pytest
from helpers import ROOT, run

# the cheapest backbone of each kind; tests/layers asks the same of every layer
MODELS = ('tf_efficientnet_lite0_ela_b', 'mobilenetv4_conv_small_050_sa', 'mobilenetv2_050_triplet', 'resnet18_ca')
# timm has up to twenty tags for a ResNet, and its test of settings runs for each.
SELECTED = f'({" or ".join(MODELS)}) and not (default_cfgs and resnet and graft and not graft_a1_in1k)'
# One of each way in which timm's tests select models: by name, with tags, by module.
KINDS = {
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_features',
    'test_model_forward_intermediates', 'test_model_forward_torchscript', 'test_model_forward_fx',
    'test_model_backward_fx', 'test_model_forward_fx_torchscript',
}


def test_timms_model_tests_pass_on_our_models(tmp_path):
    try:
        conformance.fetch_timm_tests()
    except conformance.Unavailable as error:
        pytest.skip(str(error))
    report = tmp_path / 'report.xml'
    script = ROOT / 'tests' / 'conformance.py'
    run([sys.executable, script, '-q', '--tb=short', f'--junit-xml={report}', '-k', SELECTED], cwd=tmp_path)

    passed = defaultdict(set)
    for case in ElementTree.parse(report).iter('testcase'):
        if case.find('skipped') is None:
            kind, _, parameters = case.get('name').partition('[')
            model = next(model for model in MODELS if model in parameters)
            passed[model].add(kind)
    for model in MODELS:
        assert passed[model] >= KINDS
