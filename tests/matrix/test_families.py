"""Families of backbones that differ in kind, through every scenario, at the smallest size that shows a fault.

`make matrix` does it for all families.
"""

import json

import pytest

from tests.matrix import matrix
from tests.matrix.checks import KINDS, check
from tests.matrix.members import families, members
from tests.matrix.page import page

# What each is here for. Explicit types, so that a processor that is slow at bf16 sees the same faults.
FAMILIES = {
    # masks of rank 5, products of mixed number types
    "swin_tiny_patch4_window7_224": (56, "depths=[2,2],num_heads=[2,4],embed_dim=32"),
    # biases kept between evaluations, a classifier of two layers
    "levit_128s": (64, None),
    # views that channels-last memory does not allow, a rotary embedding
    "vit_small_patch16_dinov3": (64, "depth=3"),
    # batch norm before the classifier
    "shvit_s1": (64, None),
    # tokens mixed by channels, in an order that fx must follow
    "xcit_nano_12_p16_224": (64, "depth=2"),
    # pooled attention that reads the size of its maps
    "mvitv2_tiny": (64, None),
    # tokens in an order of their own
    "hiera_tiny_224": (64, "stages=[1,1,1,1]"),
    # a forward pass with many optional arguments
    "naflexvit_base_patch16_gap": (64, "depth=2,embed_dim=64,num_heads=2"),
    # blocks with halos, which few image sizes suit
    "halonet26t": (256, None),
    # tables made in the first forward pass
    "convit_tiny": (64, "depth=3,local_up_to_layer=2"),
    # a convolution whose backward pass ends the process in channels-last memory
    "gernet_s": (64, None),
    # attention on keys of another type than its queries
    "pvt_v2_b0": (64, None),
}


BF16, FP32 = ("bf16", "bf16"), ("fp32", "none")
CASES = [(name, FP32 if name == "gernet_s" else BF16) for name in FAMILIES]
CASES.append(("swin_tiny_patch4_window7_224", FP32))
LARGE = {"halonet26t", "mvitv2_tiny"}  # the matrix does the rest of these


@pytest.mark.parametrize(("name", "types"), CASES, ids=[f"{name}-{types[0]}" for name, types in CASES])
def test_everything_works(name, types, tmp_path, run_cli):
    size, arguments = FAMILIES[name]

    def run(*words):
        words += ("--model-kwargs", arguments) if arguments and words[0] != "evaluate" else ()
        done = run_cli(*words)
        return done.code, done.stdout, done.stderr

    kinds = ("freeze",) if name in LARGE else KINDS
    found = check(name, [size], tmp_path, run, ("--dtype", types[0], "--amp", types[1]), kinds)
    assert found["can_be_cut"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_everything_works_on_a_gpu_as_on_a_cpu(name, tmp_path, run_cli):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    size, arguments = FAMILIES[name]
    losses = []
    for device in ("cpu", "cuda"):

        def run(*words, device=device):
            words += ("--model-kwargs", arguments) if arguments and words[0] != "evaluate" else ()
            done = run_cli(*words, *(("--device", device) if words[0] != "backbones" else ()))
            return done.code, done.stdout, done.stderr

        folder = tmp_path / device
        check(name, [size], folder, run, ("--dtype", "fp32", "--amp", "none"))
        losses.append(json.loads((folder / "head" / "evaluation-val.json").read_text())["log_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_table_has_every_family_that_is_installed():
    known = {member.family for member in members()}
    missing = set(families()) - known
    assert not missing, "python -m tests.matrix.members measures them"


def test_what_ends_a_process_is_a_row_of_the_matrix(monkeypatch):
    import os

    member = members()[0]
    monkeypatch.setattr(matrix, "check", lambda *given: os.abort())
    found = matrix.forked(member, "default")
    assert found["outcome"] == "broken"
    assert "-6" in found["why"]


def test_the_page_counts_what_works_and_gives_the_reasons():
    rows = []
    for family, outcome in (("swin", "works"), ("torchvision/vgg", "works"), ("nest", "refused")):
        for variant in matrix.VARIANTS:
            row = {"family": family, "name": family, "variant": variant, "outcome": outcome, "seconds": 1.0}
            row |= {"why": "error: no | hint: yes"} if outcome == "refused" else {
                "units": 9, "cuts": 4, "saved_at_half": 0.5, "image_size": [64, 64], "can_be_cut": True,
                "head_computes": "bf16 by autocast (cosine 1.0)",
            }  # fmt: skip
            rows.append(row)
    text = page(rows)
    assert "3 families: 2 work, 1 are refused before work, 0 do not work." in text
    assert "| swin | swin | 64x64 | yes | 9 | 4 | 50% | bf16 by autocast |" in text
    assert "refused: error: no / hint: yes" in text
    assert text.index("| swin ") < text.index("| torchvision/vgg ")
