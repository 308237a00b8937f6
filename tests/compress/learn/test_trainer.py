"""The training loop: exact resume, accumulation, processes, NaN, memory, files."""

import json
import math
import signal

import pytest
import torch
from torch import nn

from pyllmlite.compress.learn.settings import TrainSettings
from pyllmlite.compress.learn.trainer import DivergedError, Trainer
from pyllmlite.core.errors import CapacityError, ConfigError, ModelError


class Net(nn.Module):
    """With dropout, so that random numbers matter, and a buffer that changes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = nn.Linear(5, 9), nn.Linear(9, 3)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)

    def forward(self, x):
        self.seen += 1
        return self.second(self.drop(torch.tanh(self.first(x))))


class Data:
    def __init__(self, rows=4, seed=3):
        self.rows, self.seed = rows, seed

    def batch(self, index):
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        return {"x": torch.randn(self.rows, 5, generator=generator), "index": index}


def objective(module, batch):
    out = module(batch["x"])
    loss = (out - batch["x"][:, :3]).square().mean()
    return loss, {"size": float(out.detach().abs().mean())}


def settings(out, **more):
    words = {"steps": 8, "batch_size": 4, "seq_len": 1, "learning_rate": 1e-2, "save_every": 3}
    return TrainSettings(out=out, **{**words, **more})


def train(out, model=None, use=objective, data=None, **more):
    model = model or Net()
    trainer = Trainer(model, use, data or Data(), settings(out, **more), progress=False)
    return model, trainer.run()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(),
                                                 strict=True))  # fmt: skip


def cut_off_at(index):
    def failing(module, batch):
        if batch["index"] == index:
            raise RuntimeError("power failure")
        return objective(module, batch)

    return failing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, dtype):
    more = {"dtype": dtype, "grad_accumulation": 2, "weight_decay": 0.1}
    whole, history = train(tmp_path / "whole", **more)
    with pytest.raises(RuntimeError, match="power failure"):
        train(tmp_path / "cut", use=cut_off_at(14), **more)  # in step 8, behind checkpoint 6
    torch.manual_seed(99)  # whatever the second process did before
    torch.randn(17)
    resumed, later = train(tmp_path / "cut", **more)
    assert later.resumed == 6
    assert same(whole, resumed)
    strip = [[{k: v for k, v in r.items() if k != "seconds"} for r in h] for h in (history, later)]
    assert strip[0] == strip[1]
    states = [torch.load(tmp_path / d / "checkpoint.pt") for d in ("whole", "cut")]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in states), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])


def test_a_seed_is_a_result(tmp_path):
    a, _ = train(tmp_path / "a")
    b, _ = train(tmp_path / "b")
    c, _ = train(tmp_path / "c", seed=1)
    assert same(a, b) and not same(a, c)


def test_the_callers_random_numbers_stay_its_own(tmp_path):
    torch.manual_seed(5)
    expected = torch.randn(3)
    model = Net()
    torch.manual_seed(5)
    train(tmp_path, model)
    assert torch.equal(torch.randn(3), expected)


def test_a_finished_run_is_not_done_again(tmp_path):
    model, _ = train(tmp_path)
    again = Trainer(Net(), cut_off_at(0), Data(), settings(tmp_path), progress=False)
    history = again.run()
    assert same(model, again.model) and len(history) == 8


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    class Half(Data):
        def batch(self, index):
            whole = Data().batch(index // 2)["x"]
            return {"x": whole[:1] if index % 2 == 0 else whole[1:], "index": index}

    def weighted(module, batch):
        module.drop.p = 0.0
        loss, metrics = objective(module, batch)
        return loss, {**metrics, "tokens": float(len(batch["x"]))}

    a, one = train(tmp_path / "a", use=weighted, clip_norm=0.1)
    b, two = train(tmp_path / "b", use=weighted, data=Half(), grad_accumulation=2, clip_norm=0.1)
    assert one.records[0]["loss"] == pytest.approx(two.records[0]["loss"], rel=1e-6)
    assert one.records[0]["tokens"] == two.records[0]["tokens"] == 4
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_ctrl_c_ends_behind_the_step_with_a_checkpoint(tmp_path):
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("Ctrl-C is somebody else's here")

    def interrupted(module, batch):
        if batch["index"] == 4:
            signal.raise_signal(signal.SIGINT)
        return objective(module, batch)

    whole, _ = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", use=interrupted)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt")["step"] == 5
    resumed, _ = train(tmp_path / "cut")
    assert same(whole, resumed)


def test_nan_ends_in_one_line_with_the_last_good_checkpoint_kept(tmp_path):
    def broken(module, batch):
        loss, metrics = objective(module, batch)
        return (loss * math.nan if batch["index"] == 4 else loss), metrics

    model = Net()
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, model, broken)
    text = str(caught.value)
    assert "step 5" in text and "nan" in text and "step 3 is kept" in text and "\n" not in text
    good, _ = train(tmp_path / "good")  # the same steps without a NaN
    kept = torch.load(tmp_path / "checkpoint.pt")
    assert kept["step"] == 3
    assert all(torch.isfinite(v).all() for v in kept["model"].values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    resumed, _ = train(tmp_path)  # the cause is gone: it goes on from there
    assert same(good, resumed)


def test_nan_before_the_first_checkpoint(tmp_path):
    broken = Trainer(
        Net(), lambda m, b: (objective(m, b)[0] * math.inf, {}), Data(), settings(tmp_path),
        progress=False, evaluate=lambda module: {"kl": 1.0},
    )  # fmt: skip
    with pytest.raises(DivergedError, match="no checkpoint had been written"):
        broken.run()
    assert not (tmp_path / "loss.png").exists()  # there is no loss to draw


def test_other_settings_are_not_gone_on_with(tmp_path):
    train(tmp_path)
    with pytest.raises(ConfigError, match="learning_rate 0.01, now it is 0.02"):
        train(tmp_path, learning_rate=0.02)
    train(tmp_path, learning_rate=0.02, restart=True)


def test_a_damaged_checkpoint(tmp_path):
    train(tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match="is no checkpoint"):
        train(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path):
    train(tmp_path)
    other = Net()
    other.second = nn.Linear(9, 4)
    with pytest.raises(ModelError, match="is of another model"):
        train(tmp_path, other)


def test_log_and_picture(tmp_path):
    trainer = Trainer(
        Net(), objective, Data(), settings(tmp_path, eval_every=4), progress=False,
        evaluate=lambda module: {"kl": float(module.first.weight.abs().sum())},
    )  # fmt: skip
    history = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == history.records
    assert [step for step, _ in history.values("eval_kl")] == [0, 4, 8]
    assert [r["step"] for r in lines] == list(range(9))
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_metric_is_the_mean_over_its_own_tokens(tmp_path):
    """Two micro-batches a step; ``some`` is of 3 tokens of the first, or of none at all."""

    def counted(module, batch):
        loss, _ = objective(module, batch)
        first = batch["index"] == 0
        if first:
            return loss, {"tokens": 8.0, "all": 1.0, "some": 5.0, "some_tokens": 3.0}
        return loss, {"tokens": 2.0, "all": 0.0, "some": 0.0, "some_tokens": 0.0}

    _, history = train(tmp_path / "run", use=counted, grad_accumulation=2, steps=2)
    first, second = history.records
    assert (first["all"], first["some"], first["tokens"]) == (0.8, 5.0, 10.0)
    assert second["all"] == 0.0 and "some" not in second and "some_tokens" not in first


def test_schedules(tmp_path):
    one = settings(tmp_path, steps=100, warmup=10, learning_rate=1.0, final_ratio=0.1)
    assert one.learning_rate_at(0) == pytest.approx(0.1)
    assert one.learning_rate_at(9) == one.learning_rate_at(10) == 1.0
    assert one.learning_rate_at(55) == pytest.approx(0.55)
    assert one.learning_rate_at(100) == pytest.approx(0.1)
    linear = settings(tmp_path, steps=100, warmup=0.2, learning_rate=1.0, schedule="linear")
    assert linear.warmup_steps == 20 and linear.learning_rate_at(60) == pytest.approx(0.5)
    constant = settings(tmp_path, warmup=0, schedule="constant")
    assert constant.learning_rate_at(0) == constant.learning_rate_at(7) == 1e-2


@pytest.mark.parametrize(
    "words",
    [{"steps": 0}, {"batch_size": 1.5}, {"learning_rate": math.nan}, {"seed": -1},
     {"schedule": "up"}, {"dtype": "float16"}, {"beta2": 2.0}],
)  # fmt: skip
def test_bad_settings(tmp_path, words):
    with pytest.raises(ConfigError, match=next(iter(words))):
        settings(tmp_path, **words)


def test_groups_learn_at_their_own_rates(tmp_path):
    model = Net()
    before = model.second.weight.detach().clone()
    groups = [
        {"params": list(model.first.parameters()), "lr_ratio": 10.0},
        {"params": list(model.second.parameters()), "lr_ratio": 0.0},
    ]
    Trainer(
        model, objective, Data(), settings(tmp_path), progress=False,
        parameter_groups=lambda module: groups,
    ).run()  # fmt: skip
    assert torch.equal(model.second.weight, before)


def test_memory_that_will_not_do(tmp_path, monkeypatch):
    from pyllmlite.model import build

    monkeypatch.setattr(build, "available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="a smaller student"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_to_train_and_other_dtypes(tmp_path):
    model = Net().requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        train(tmp_path, model)
    with pytest.raises(ConfigError, match="must be float32"):
        train(tmp_path, Net().double())
