"""Students: which there are, how they are cut, whether they load here and in transformers."""

import numpy as np
import pytest
import torch
from text_model import write_text_model
from tiny_models import TINY

from pyllmlite.compress.layered_model import LayeredModel
from pyllmlite.compress.learn.draft import needed_acceptance, speed_up
from pyllmlite.compress.learn.export import write_module
from pyllmlite.compress.learn.narrow import check_narrower
from pyllmlite.compress.learn.student import (
    Cut,
    check_student,
    check_vocabularies,
    freeze_embeddings,
    kept_layers,
    load_module,
    make_student,
    num_weights,
    parse_cut,
)
from pyllmlite.compress.learn.teacher_logits import distributions, open_scorer
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.source import open_model

IDS = torch.tensor([[5, 9, 200, 17, 3, 44, 8]])


def test_parse_cut():
    assert parse_cut("layers=10") == Cut(layers=10)
    assert parse_cut("layers=2, mlp=64,kv-heads=1") == Cut(layers=2, mlp=64, kv_heads=1)
    assert parse_cut("some/model") is None and parse_cut("a/b=c") is None
    assert str(Cut(layers=2, hidden=8)) == "layers=2,hidden=8"
    with pytest.raises(ConfigError, match="no 'depth' to cut"):
        parse_cut("depth=3")
    with pytest.raises(ConfigError, match="layers must be a number"):
        parse_cut("layers=many")


def test_kept_layers():
    assert kept_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(5, 5) == [0, 1, 2, 3, 4]
    assert kept_layers(5, 1) == [0] and kept_layers(7, 2) == [0, 6]
    for total in range(1, 33):
        for count in range(1, total + 1):
            kept = kept_layers(total, count)
            assert kept == sorted(set(kept)) and len(kept) == count


def test_cuts_that_cannot_be(teacher):
    spec = open_model(str(teacher)).spec  # 4 heads, 2 for keys
    assert Cut(heads=2).completed(spec) == Cut(heads=2, kv_heads=2)
    assert Cut(kv_heads=1).completed(spec) == Cut(heads=2, kv_heads=1)
    assert Cut(heads=1, kv_heads=1).completed(spec) == Cut(heads=1, kv_heads=1)
    for cut in (Cut(heads=3), Cut(heads=4, kv_heads=1), Cut(layers=3), Cut(hidden=0), Cut(mlp=999)):
        with pytest.raises(ConfigError, match="cannot be cut out of"):
            cut.completed(spec)


@pytest.mark.parametrize("family", ["llama-mha", "qwen2-window", "gemma3", "gpt2", "bloom"])
def test_layers_of_every_kind(family, tmp_path):
    """The kept layers are the teacher's own: what they give on the way is what a teacher without
    the others gives."""
    source = open_model(str(TINY[family](tmp_path / "t")))
    count = source.spec.num_layers - 1
    student = make_student(source, Cut(layers=count))
    teacher = load_module(source)
    layers = next(
        m for m in teacher.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > count
    )
    kept = kept_layers(source.spec.num_layers, count)
    tuples = LayeredModel(source).returns_tuple
    for index in set(range(source.spec.num_layers)) - set(kept):
        # A skipped layer hands its input on.
        layers[index].forward = lambda h, *a, t=tuples, **k: (h, None) if t else h
    with torch.no_grad():
        expected = teacher(input_ids=IDS, use_cache=False).logits
        found = student(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert student.config.num_hidden_layers == count
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())


def test_a_narrower_student_keeps_what_is_used(tmp_path):
    """Channels, neurons and heads that carry nothing are those that go, and nothing changes."""
    source = open_model(str(write_text_model(tmp_path / "t", seed=3)))
    from safetensors.torch import load_file, save_file

    path = tmp_path / "t" / "model.safetensors"
    state = load_file(path)
    rng = np.random.default_rng(0)
    dead = {
        i: (rng.choice(128, 28, replace=False), rng.integers(0, 2)) for i in range(2)
    }  # MLP neurons and the KV head of each layer
    for i, (neurons, group) in dead.items():
        at = f"model.layers.{i}."
        state[at + "mlp.up_proj.weight"][neurons] = 0
        state[at + "self_attn.v_proj.weight"][group * 16 : group * 16 + 16] = 0
    save_file(state, path)
    source = open_model(str(tmp_path / "t"))
    teacher = load_module(source)
    texts = [IDS[0].tolist(), [7, 7, 90, 4]]
    student = make_student(source, Cut(mlp=100, kv_heads=1), texts)
    config = student.config
    assert (config.intermediate_size, config.num_key_value_heads) == (100, 1)
    assert (config.num_attention_heads, config.head_dim) == (2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            student(input_ids=IDS).logits, teacher(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
        )


def test_fewer_channels(teacher, tmp_path):
    source = open_model(str(teacher))
    with pytest.raises(ConfigError, match="needs text"):
        make_student(source, Cut(hidden=40))
    student = make_student(source, Cut(layers=1, hidden=40, heads=2, mlp=60), [IDS[0].tolist()])
    state = student.state_dict()
    assert state["model.embed_tokens.weight"].shape == (259, 40)
    assert state["model.layers.0.self_attn.o_proj.weight"].shape == (40, 32)
    assert state["model.layers.0.mlp.down_proj.weight"].shape == (40, 60)
    full = load_module(source).state_dict()["model.embed_tokens.weight"]
    kept = [int((full.T == column[None]).all(1).nonzero()[0]) for column in
            state["model.embed_tokens.weight"].T]  # fmt: skip
    assert kept == sorted(kept) and len(set(kept)) == 40
    round_trip(student, source, tmp_path / "s")


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_fewer_channels_beside_norms_of_queries_and_keys(family, tmp_path):
    source = open_model(str(TINY[family](tmp_path / "t")))
    hidden = source.spec.hidden_size - 4
    check_student(source, Cut(hidden=hidden))
    student = make_student(source, Cut(hidden=hidden), [IDS[0].tolist()])
    full = load_module(source).state_dict()
    name = "model.layers.0.self_attn.q_norm.weight"
    assert torch.equal(student.state_dict()[name], full[name])
    assert student.state_dict()["model.norm.weight"].shape == (hidden,)
    with torch.no_grad():
        assert student(input_ids=IDS).logits.isfinite().all()


def test_what_belongs_nowhere_is_refused_before_any_work(tmp_path):
    layered = LayeredModel(open_model(str(TINY["llama"](tmp_path / "t"))))
    check_narrower(layered, Cut(hidden=8))
    layered.model.register_buffer("odd", torch.zeros(3))
    check_narrower(layered, Cut(mlp=8))
    with pytest.raises(ConfigError, match="what odd belongs to is not known"):
        check_narrower(layered, Cut(hidden=8))


def test_narrower_students_of_other_families_are_refused(tmp_path):
    source = open_model(str(TINY["gpt2"](tmp_path / "t")))
    with pytest.raises(ConfigError, match="cannot be cut out of gpt2"):
        make_student(source, Cut(mlp=20), [[1, 2]])


def round_trip(student, source, path, dtype="f32"):
    """Written, it gives the same logits in transformers and in the engine."""
    import transformers

    path.mkdir()
    with torch.no_grad():
        expected = student(input_ids=IDS).logits[0]
    write_module(student, source, path, dtype)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits[0], expected, atol=1e-5, rtol=1e-4)
    made = open_model(str(path))
    assert made.tokenizer().encode("hello") == source.tokenizer().encode("hello")
    ((_, logits),) = distributions(open_scorer(made, 16), [(IDS[0].tolist(), 6)])
    np.testing.assert_allclose(logits, expected[:-1].numpy(), atol=2e-4)
    return made


def test_it_loads_here_and_in_transformers(teacher, tmp_path):
    source = open_model(str(teacher))
    made = round_trip(make_student(source, Cut(layers=1)), source, tmp_path / "s")
    assert made.spec.num_layers == 1 and made.spec.tie_embeddings
    assert num_weights(made.spec) == sum(
        p.numel() for p in make_student(source, Cut(layers=1)).parameters()
    )


def test_vocabularies_that_differ(teacher, tmp_path):
    source = open_model(str(teacher))
    check_vocabularies(source, source)
    other = open_model(str(TINY["llama"](tmp_path / "other")))
    with pytest.raises(ConfigError, match="has 331 tokens, the teacher 259") as caught:
        check_vocabularies(source, other)
    assert "\n" not in str(caught.value)
    path = write_text_model(tmp_path / "swapped")
    text = (path / "tokenizer.json").read_text()
    assert '"A":' in text and '"B":' in text
    swapped = text.replace('"A":', '"\u2603":').replace('"B":', '"A":').replace('"\u2603":', '"B":')
    (path / "tokenizer.json").write_text(swapped)
    with pytest.raises(ConfigError, match="another vocabulary than the teacher: '[AB]'"):
        check_vocabularies(source, open_model(str(path)))


def test_frozen_embeddings(teacher):
    student = make_student(open_model(str(teacher)), Cut(layers=1))
    freeze_embeddings(student)
    frozen = [n for n, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_whether_a_draft_pays():
    assert needed_acceptance(0.3, 0.15) == pytest.approx(0.45)
    assert needed_acceptance(0.9, 0.15) is None
    assert speed_up(0.44, 0.3, 0.15) == 1.0 < speed_up(0.46, 0.3, 0.15)
    assert speed_up(0.8, 0.1, 0.1) == pytest.approx(
        max(sum(0.8**i for i in range(k + 1)) / (1 + 0.2 * k) for k in range(1, 9))
    )
