# SPDX-License-Identifier: Apache-2.0
"""A training step compiled for TPUs that are not there, and what is said of it."""

import dataclasses

import pytest
from nlx_experiments import chips, config, learner, pod
from nlx_experiments.config import MeshConfig
from nlx_experiments.errors import Refused
from nlx_kernels import ahead_of_time

for_tpu = pytest.mark.skipif(
    not ahead_of_time.available(), reason='libtpu is not installed: pip install "nlx[aot]"'
)


def chosen(**fields):
    made = config.make("hope-tiny", kind=pod.Compile, batch=8, length=64, **fields)
    small = dataclasses.replace(made.model, bfloat16=True, width=64, heads=2, hidden=32)
    return dataclasses.replace(made, model=small)


@for_tpu
@pytest.mark.slow
def test_what_a_step_takes_of_four_chips():
    sizes = {}
    for name, mesh in {"data": MeshConfig(), "fsdp": MeshConfig(data=1, fsdp=4)}.items():
        found = pod.measure(chosen(mesh=mesh), "v5e:2x2")
        assert found["fits"]
        hope = "self_modifying_memory"
        assert found["kernels"] == ["cms_chain", hope, f"{hope}_backward"]
        assert not found["exchanged_at_every_chunk"]
        assert ("all-gather" in found["sent"]) == (name == "fsdp")
        assert found["sent_per_token"] > 0
        times = found["seconds_at_least"]
        assert times["step"] == max(times[name] for name in ("products", "memory", "links"))
        peak = chips.CHIPS["TPU v5 lite"].bfloat16
        assert found["mfu_at_most"] == pytest.approx(
            found["flops_per_token"] * found["tokens_per_second_at_most"] / 4 / peak
        )
        sizes[name] = found["bytes_per_device"]["state"]
        assert "fits" in pod.table(found).text()
    assert sizes["fsdp"] < 0.8 * sizes["data"]  # what is no matrix is whole everywhere


@for_tpu
@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        (
            "v9z:2x2",
            "`topology` is 'v9z:2x2', which the compiler does not know",
        ),
        ("v5e:2x4", "the mesh is data 0, .* tensor 16, .* there are 8 devices"),
    ],
)
def test_what_cannot_be_compiled_gets_a_sentence(topology, sentence):
    with pytest.raises(Refused, match=sentence):
        pod.measure(chosen(mesh=MeshConfig(tensor=16)), topology)


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "available", lambda: False)
    with pytest.raises(Refused, match=r'not installed: pip install "nlx\[aot\]"'):
        pod.measure(chosen(), "v5e:2x2")


def test_products_do_not_depend_on_what_is_made_again():
    plain = chosen()
    again = dataclasses.replace(plain, model=dataclasses.replace(plain.model, remat=True))
    assert learner.flops_a_token(plain) == learner.flops_a_token(again) > 0
