"""Training: losses against plain twins, packing without cross-talk, and exact resume."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

pytest.importorskip("torch", reason="pip install 'edgelm[distill]'")
pytest.importorskip("transformers", reason="pip install 'edgelm[distill]'")

import torch
from edgelm_export.distill.data import EncodedExample, collate
from edgelm_export.distill.losses import cross_entropy, forward_kl, forward_kl_top_k
from edgelm_export.distill.settings import TrainingSettings, learning_rate
from edgelm_export.distill.shape import StudentShape
from edgelm_export.distill.student import inherit_layers, make_student
from edgelm_export.distill.teacher import add_teacher_targets
from edgelm_export.distill.trainer import Trainer, target_logits

from edgelm.errors import CheckpointError, ConfigError

TINY = StudentShape(hidden=32, layers=2, heads=2, kv_heads=1, mlp=32)
VOCABULARY = 24


pytestmark = pytest.mark.usefixtures("one_torch_thread")

logits = arrays(np.float32, (5, 7), elements=st.floats(-20, 20, width=32))


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - math.log(sum(math.exp(value) for value in shifted))


@given(logits=logits, labels=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_cross_entropy_equals_a_plain_loop(logits, labels):
    plain = -sum(log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)) / 5
    assert cross_entropy(torch.from_numpy(logits), torch.tensor(labels)).item() == pytest.approx(plain, abs=1e-4)


@given(student=logits, teacher=logits, temperature=st.floats(0.5, 8))
def test_kl_equals_a_plain_loop_and_is_never_negative(student, teacher, temperature):
    plain = 0.0
    for given_row, wanted_row in zip(student, teacher, strict=True):
        given_log, wanted_log = log_softmax(given_row / temperature), log_softmax(wanted_row / temperature)
        plain += sum(math.exp(w) * (w - g) for w, g in zip(wanted_log, given_log, strict=True))
    measured = forward_kl(torch.from_numpy(student), torch.from_numpy(teacher), temperature).item()
    assert measured == pytest.approx(temperature**2 * plain / 5, rel=1e-3, abs=1e-3)
    assert measured >= -1e-4


@given(student=logits, shift=st.floats(-3, 3), temperature=st.floats(0.5, 8))
def test_kl_of_equal_distributions_is_zero(student, shift, temperature):
    same = torch.from_numpy(student)
    assert forward_kl(same, same + shift, temperature).item() == pytest.approx(0, abs=1e-4)


@given(student=logits, teacher=logits, temperature=st.floats(0.5, 8), k=st.integers(1, 7))
def test_kl_of_the_best_tokens_takes_the_others_as_one(student, teacher, temperature, k):
    soft = torch.log_softmax(torch.from_numpy(teacher) / temperature, -1)
    log_probs, tokens = soft.topk(k, -1)
    plain = 0.0
    for given_row, wanted_row, best in zip(student, teacher, tokens.tolist(), strict=True):
        given_log, wanted_log = log_softmax(given_row / temperature), log_softmax(wanted_row / temperature)
        groups = [[token] for token in best] + [[token for token in range(7) if token not in best]]
        for group in filter(None, groups):
            wanted, given_ = (sum(math.exp(log[token]) for token in group) for log in (wanted_log, given_log))
            plain += wanted * (math.log(wanted) - math.log(given_)) if wanted > 1e-5 else 0.0
    measured = forward_kl_top_k(torch.from_numpy(student), log_probs, tokens, temperature).item()
    assert measured == pytest.approx(temperature**2 * plain / 5, rel=2e-2, abs=temperature**2 * 2e-3)


def random_examples(count: int, seed: int = 0) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    return [
        EncodedExample(
            rng.integers(3, VOCABULARY, size := int(rng.integers(3, 12))).astype(np.int32), int(rng.integers(1, size))
        )
        for _ in range(count)
    ]


def tiny_model(seed: int = 0):
    return make_student(TINY, VOCABULARY, 32, 1, 0, seed)


def test_packed_examples_get_the_logits_they_get_alone_on_targets_only():
    model, examples = tiny_model().eval(), random_examples(6)
    with torch.no_grad():
        packed, labels = target_logits(model, collate([examples[:3], examples[3:]], 40), "cpu")
        alone, wanted = [], []
        for example in examples:
            tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
            alone.append(model(tokens).logits[0, example.target_start - 1 : -1])
            wanted.append(tokens[0, example.target_start :])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    assert torch.equal(labels, torch.cat(wanted))


SETTINGS = TrainingSettings(epochs=3, batch_tokens=64, row_length=32, dropout=0.2, averaging=0.9, smoothing=0.1)


def weights_of(trainer: Trainer) -> dict:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


class StopHereError(Exception):
    pass


@settings(max_examples=4, deadline=None)
@given(stop_at=st.integers(1, 20), with_teacher=st.booleans(), muon=st.booleans())
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path_factory, stop_at, with_teacher, muon):
    checkpoint = tmp_path_factory.mktemp("resume") / "state.pt"
    examples = random_examples(60)

    def trainer(path=None):
        teacher = tiny_model(7) if with_teacher else None
        return Trainer(tiny_model(), lambda _: examples, replace(SETTINGS, muon=muon), teacher=teacher, checkpoint=path)

    whole = trainer()
    whole.run()
    broken = trainer(checkpoint)

    def stop(progress):
        if progress.step == stop_at:
            raise StopHereError

    with pytest.raises(StopHereError):
        broken.run(stop)
    broken.save()
    torch.manual_seed(99)  # as in another process
    resumed = trainer(checkpoint)
    resumed.resume()
    resumed.run()
    assert resumed.progress.step == whole.progress.step > 20
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name


def test_training_lowers_the_loss_and_averaging_gives_other_weights():
    examples = random_examples(20)
    losses = []
    settings = TrainingSettings(epochs=30, batch_tokens=128, row_length=32, lr=1e-2)
    plain = Trainer(tiny_model(), lambda _: examples, settings)
    plain.run(lambda progress: losses.append(progress.loss))
    assert losses[-1] < 0.7 * losses[0]
    averaged = Trainer(tiny_model(), lambda _: examples, replace(settings, averaging=0.9))
    averaged.run()
    assert averaged.progress.loss == plain.progress.loss
    assert not torch.equal(plain.model.model.norm.weight, averaged.model.model.norm.weight)


def test_dropout_ends_with_the_training_and_clipping_bounds_a_step():
    settings = TrainingSettings(
        epochs=1, batch_tokens=64, row_length=32, dropout=0.5, max_grad_norm=1e-12, weight_decay=0.0
    )
    trainer = Trainer(tiny_model(), lambda _: random_examples(20), settings)
    before = weights_of(trainer)
    trainer.run()
    after = weights_of(trainer)
    assert all((after[name] - weight).abs().max() < 1e-3 for name, weight in before.items())
    trainer.model.train()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(trainer.model(tokens).logits, trainer.model(tokens).logits)


def test_training_brings_a_student_closer_to_its_teacher():
    examples = random_examples(40)
    teacher = tiny_model(7)
    batch = collate([[example] for example in examples], 32)

    def distance(model) -> float:
        with torch.no_grad():
            return forward_kl(
                target_logits(model, batch, "cpu")[0], target_logits(teacher, batch, "cpu")[0], 1.0
            ).item()

    student = tiny_model(1)
    before = distance(student)
    settings = TrainingSettings(epochs=10, batch_tokens=128, row_length=32, kl_weight=1.0)
    Trainer(student, lambda _: examples, settings, teacher=teacher).run()
    assert distance(student) < 0.5 * before


def test_a_student_with_fewer_layers_starts_with_every_second_layer_of_its_teacher():
    teacher = make_student(replace(TINY, layers=5), VOCABULARY, 32, 1, 0, seed=1)
    student = make_student(replace(TINY, layers=3), VOCABULARY, 32, 1, 0, seed=2)
    assert inherit_layers(student, teacher)
    theirs, ours = teacher.state_dict(), student.state_dict()
    for mine, source in ((0, 0), (1, 2), (2, 4)):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(ours[name.format(mine)], theirs[name.format(source)])
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])


@pytest.mark.parametrize("shape", [replace(TINY, layers=3), replace(TINY, mlp=64), replace(TINY, hidden=64)])
def test_a_student_of_another_shape_is_unchanged(shape):
    teacher = make_student(TINY, VOCABULARY, 32, 1, 0, seed=1)
    student = make_student(shape, VOCABULARY, 32, 1, 0, seed=2)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    assert not inherit_layers(student, teacher)
    assert all(torch.equal(weight, before[name]) for name, weight in student.state_dict().items())


def test_stored_teacher_targets_equal_those_of_every_step():
    examples = random_examples(30)
    every = replace(SETTINGS, dropout=0.0, kl_weight=1.0, smoothing=0.0, teacher_top_k=0)
    at_every_step = Trainer(tiny_model(), lambda _: examples, every, teacher=tiny_model(7))
    at_every_step.run()
    kept = replace(every, teacher_top_k=VOCABULARY)
    asked = add_teacher_targets(tiny_model(7), examples, kept)
    assert all(example.teacher_targets is not None for example in asked)
    once = Trainer(tiny_model(), lambda _: asked, kept)
    once.run()
    assert once.progress.loss == pytest.approx(at_every_step.progress.loss, abs=1e-4)
    for name, weight in weights_of(once).items():
        torch.testing.assert_close(weight, weights_of(at_every_step)[name], atol=1e-3, rtol=0)


def test_a_time_limit_ends_the_run_with_a_low_learning_rate():
    ticks = iter(range(10_000))
    settings = TrainingSettings(epochs=1000, batch_tokens=64, row_length=32, max_s=40, warmup=0.1)
    trainer = Trainer(tiny_model(), lambda _: random_examples(20), settings, clock=lambda: float(next(ticks)))
    trainer.run()
    assert 20 <= trainer.progress.step <= 45
    assert trainer.progress.elapsed_s >= 40
    assert learning_rate(trainer.progress.fraction_done, settings) < 0.1 * settings.lr


@given(share=st.floats(0, 1), warmup=st.floats(0, 0.9))
def test_the_rate_stays_between_zero_and_its_peak(share, warmup):
    settings = TrainingSettings(warmup=warmup)
    assert 0 < learning_rate(share, settings) <= settings.lr * (1 + 1e-9)
    assert learning_rate(1.0, settings) == pytest.approx(settings.lr / 100)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    Trainer(tiny_model(), lambda _: [], SETTINGS, checkpoint=path, identity="one").save()
    with pytest.raises(CheckpointError, match=r"state.pt"):
        Trainer(tiny_model(), lambda _: [], SETTINGS, checkpoint=path, identity="two").resume()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state.pt"):
        Trainer(tiny_model(), lambda _: [], SETTINGS, checkpoint=path, identity="one").resume()


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": 0.0}, {"lr": math.nan}, {"kl_weight": 2}, {"batch_tokens": 8}, {"max_s": 0.0}]
)
def test_settings_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("_", "-")):
        TrainingSettings(**wrong)
