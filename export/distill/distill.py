"""Distillation from a data file to a checkpoint directory: tokenizer, student, training.

During training, all files are in `OUT.partial` beside OUT; OUT appears complete, by one rename.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer

from edgelm.errors import CheckpointError, ConfigError, EdgelmError
from edgelm.evaluation.tasks import Task, TaskScore, read_tasks

from ..write.staging import check_target, staged_directory
from .data import Batch, EncodedExample, encode_tasks, make_batches
from .losses import cross_entropy
from .score_student import evaluate_student
from .settings import TrainingProgress, TrainingSettings, fit_settings
from .shape import StudentShape, parse_shape
from .student import inherit_layers, load_transformers_model, make_student, save_student
from .student_tokenizer import BOS, EOS, save_tokenizer, train_tokenizer
from .teacher import add_teacher_targets
from .trainer import Dataset, Trainer, target_logits

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files copied from a teacher's or student's directory if they exist; the first is required."""


@dataclass(frozen=True, slots=True)
class InitialStudent:
    """A student before training.

    Parameters
    ----------
    model
        The student, fp32.
    tokenizer
        Its tokenizer.
    eos_ids
        Tokens that end an answer; the first is used in training.
    write_tokenizer
        Writes the tokenizer's files into a directory.
    """

    model: Any
    tokenizer: Tokenizer
    eos_ids: list[int]
    write_tokenizer: Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class DistillResult:
    """The result of a run. `score` is on held-out examples; None if there are none."""

    progress: TrainingProgress
    settings: TrainingSettings
    score: TaskScore | None


MIN_EXAMPLES_FOR_HOLD_OUT: Final = 40
"""With at least this many examples some are held out: a tenth, at most `MAX_HELD_OUT`."""
MAX_HELD_OUT: Final = 500


def split_held_out(tasks: Sequence[Task], count: int | None, seed: int) -> tuple[list[Task], list[Task]]:
    """Return training tasks and `count` held-out ones, chosen by the seed; None: a tenth if there are enough.

    No prompt is in both. If several tasks share a held-out prompt, the first is used. Raises `ConfigError` if no task
    is left for training.
    """
    prompts = list(dict.fromkeys(task.prompt for task in tasks))
    if count is None:
        count = min(len(prompts) // 10, MAX_HELD_OUT) if len(prompts) >= MIN_EXAMPLES_FOR_HOLD_OUT else 0
    if not 0 <= count < len(prompts):
        raise ConfigError(f"held-out {count}: of {len(prompts)} prompts at least one must be left for training")
    drawn = {prompts[i] for i in np.random.default_rng([seed, 2]).permutation(len(prompts))[:count]}
    unseen = {task.prompt: task for task in reversed(tasks) if task.prompt in drawn}
    return [task for task in tasks if task.prompt not in drawn], list(unseen.values())


def distill(
    student: str,
    data: Path,
    out: Path,
    setting_overrides: Mapping[str, Any],
    *,
    held_out: int | None = None,
    threads: int | None = None,
    teacher: Path | None = None,
    vocab_size: int = 2048,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    report: Callable[[TrainingProgress], None] = lambda _: None,
    on_message: Callable[[str], None] = lambda _: None,
) -> DistillResult:
    """Train a student on tasks and write it to `out` as a Hugging Face directory.

    Parameters
    ----------
    student
        A checkpoint directory to continue from, or a shape (see `parse_shape`) for random weights. A new student has
        the teacher's tokenizer, and its weights if only the number of layers differs (see `inherit_layers`); without a
        teacher it gets a new tokenizer, trained on the data.
    data
        JSONL of `{"prompt", "target"}`; see `edgelm.evaluation.tasks.read_tasks`.
    out
        Directory to create.
    setting_overrides
        Fields of `TrainingSettings`; row length, batch size and epochs are chosen for the data if missing.
    held_out
        Number of examples held out of training, to score the student with; see `split_held_out`.
    threads
        Threads of torch; None measures which number is fastest. It changes the last digits of sums.
    teacher
        Checkpoint directory of the teacher; None: supervised training.
    vocab_size
        Size of a new tokenizer.
    resume
        Continue from `out`.partial if it exists.
    force
        Replace `out` and discard `out`.partial.
    report, on_message
        Called with the progress, and with a line on other work.

    Raises
    ------
    DataError, CheckpointError, ConfigError
        An argument or a file is invalid; `out` is unchanged.
    """
    prepare_target(out, resume=resume, force=force)
    tasks, unseen = split_held_out(read_tasks(data), held_out, int(setting_overrides.get("seed") or 0))
    teacher_model = load_transformers_model(teacher, "teacher") if teacher else None
    tokenizer = _tokenizer(student, tasks, teacher, vocab_size)
    lengths = [len(each.tokens) for each in encode_tasks(tokenizer, tasks, 0, sys.maxsize)]
    settings = fit_settings(lengths, setting_overrides)
    start = _start(student, tokenizer, teacher, settings)
    if teacher is not None:
        _check_same_vocabulary(start, teacher, teacher_model)
    examples = encode_tasks(start.tokenizer, tasks, start.eos_ids[0], settings.row_length)
    if teacher_model is not None and settings.teacher_top_k:
        examples = add_teacher_targets(teacher_model, examples, settings, device)
        teacher_model = None
    torch.set_num_threads(threads or _best_threads(start.model, examples, settings, device, on_message))
    identity = hash_parts(
        data.read_bytes(),
        str(len(unseen)),
        student,
        str(teacher),
        str(vocab_size),
        json.dumps(asdict(settings), sort_keys=True),
    )
    progress = train_into(
        out, start, lambda _epoch: examples, settings,
        teacher=teacher_model, device=device, identity=identity, resume=resume, report=report,
    )  # fmt: skip
    if not unseen:
        return DistillResult(progress, settings, None)
    on_message(f"answering {len(unseen)} held-out prompts")
    return DistillResult(progress, settings, evaluate_student(start.model, start.tokenizer, unseen))


def _best_threads(
    model: Any,
    examples: Sequence[EncodedExample],
    settings: TrainingSettings,
    device: str,
    on_message: Callable[[str], None],
) -> int:
    """Return the number of threads with the fastest training step, at the machine's current load."""
    most = int(torch.get_num_threads())
    if device != "cpu" or most == 1:
        return most
    on_message("measuring the fastest number of threads")
    rows = max(1, settings.batch_tokens // settings.row_length)
    batch = make_batches(examples, settings.row_length, rows, np.random.default_rng(0))[0]
    seconds: dict[int, float] = {}
    for count in sorted({1, *(2**power for power in range(1, 6) if 2**power < most), most}):
        torch.set_num_threads(count)
        seconds[count] = min(_step_seconds(model, batch) for _ in range(3))
        if seconds[count] > 1.5 * min(seconds.values()):
            break  # more threads will not be faster
    model.zero_grad(set_to_none=True)
    best: int = min(seconds, key=lambda count: seconds[count])
    return best


def _step_seconds(model: Any, batch: Batch) -> float:
    start = time.perf_counter()
    logits, labels = target_logits(model, batch, "cpu")
    cross_entropy(logits, labels, 0.0).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def train_into(
    out: Path,
    start: InitialStudent,
    dataset: Dataset,
    settings: TrainingSettings,
    *,
    teacher: Any = None,
    device: str = "cpu",
    identity: str = "",
    resume: bool = False,
    report: Callable[[TrainingProgress], None] = lambda _: None,
) -> TrainingProgress:
    """Train `start` and write `out`; call `prepare_target` first. See `distill` and `Trainer` for the parameters."""
    partial = partial_directory(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgelmError(f"{partial} cannot be written: {error.strerror}") from error
    checkpoint = partial / "state.pt"
    trainer = Trainer(
        start.model, dataset, settings, teacher=teacher, checkpoint=checkpoint, device=device, identity=identity
    )
    if resume and checkpoint.exists():
        trainer.resume()
    trainer.run(report)
    with staged_directory(out, force=True, is_replaceable=_is_checkpoint) as stage:  # checked in prepare_target
        save_student(start.model, stage, start.eos_ids)
        start.write_tokenizer(stage)
    shutil.rmtree(partial)
    return trainer.progress


def partial_directory(out: Path) -> Path:
    """Return the directory that holds a run's checkpoint while it trains."""
    return out.with_name(out.name + ".partial")


def prepare_target(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse an existing `out` or an unfinished run, unless `force` or `resume` covers it.

    Raises
    ------
    EdgelmError
        Something exists that neither `resume` nor `force` covers.
    """
    check_target(out, force=force, is_replaceable=_is_checkpoint)
    partial = partial_directory(out)
    if partial.exists() and not resume:
        if not force:
            raise ConfigError(f"{partial} holds an unfinished run: --resume continues it, --force discards it")
        shutil.rmtree(partial)


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def hash_parts(*parts: str | bytes) -> str:
    """Return the SHA-256 of all parts, hex: the identity of a run's data and settings."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _tokenizer(student: str, tasks: Sequence[Task], teacher: Path | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of the student's directory, of the teacher, or a new one."""
    if Path(student).is_dir():
        return open_tokenizer(Path(student))
    if "=" not in student:
        raise ConfigError(f"student {student!r} is neither a directory nor a shape such as hidden=192,layers=6,heads=6")
    parse_shape(student)
    if teacher is not None:
        return open_tokenizer(teacher)
    return train_tokenizer([text for task in tasks for text in (task.prompt, task.target)], vocab_size)


def _start(student: str, tokenizer: Tokenizer, teacher: Path | None, settings: TrainingSettings) -> InitialStudent:
    """Open the student's directory, or make a student with the shape."""
    directory = Path(student)
    if directory.is_dir():
        model = load_transformers_model(directory, "student")
        return _from_directory(model, directory, model, tokenizer)
    shape = parse_shape(student)
    if teacher is not None:
        guide = load_transformers_model(teacher, "teacher")
        context = guide.config.max_position_embeddings
        model = _make(shape, guide.config.vocab_size, context, guide.config.bos_token_id or 0, 0, settings)
        inherit_layers(model, guide)
        return _from_directory(model, teacher, guide, tokenizer)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    context = settings.row_length
    model = _make(shape, tokenizer.get_vocab_size(), context, bos, eos, settings)
    return InitialStudent(model, tokenizer, [eos], lambda to: save_tokenizer(tokenizer, to, context))


def _make(shape: StudentShape, vocab_size: int, context: int, bos: int, eos: int, settings: TrainingSettings) -> Any:
    if settings.row_length > context:
        raise ConfigError(f"row length {settings.row_length} is over the context of {context} tokens")
    return make_student(shape, vocab_size, context, bos, eos, settings.seed)


def _from_directory(model: Any, directory: Path, owner: Any, tokenizer: Tokenizer) -> InitialStudent:
    """Use the tokenizer's files and end tokens of `directory`, whose model is `owner`."""
    eos = owner.generation_config.eos_token_id
    if eos is None:
        eos = owner.config.eos_token_id
    if eos is None:
        raise CheckpointError(f"{directory} has no end token: eos_token_id in generation_config.json is missing")

    def copy(to: Path) -> None:
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, to / name)

    return InitialStudent(model, tokenizer, eos if isinstance(eos, list) else [eos], copy)


def open_tokenizer(directory: Path) -> Tokenizer:
    """Open tokenizer.json of a checkpoint directory, without truncation or padding."""
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_same_vocabulary(start: InitialStudent, teacher: Path, model: Any) -> None:
    same_tokens = start.tokenizer.get_vocab() == open_tokenizer(teacher).get_vocab()
    if not same_tokens or start.model.config.vocab_size != model.config.vocab_size:
        raise CheckpointError(
            f"the student's vocabulary is not that of the teacher {teacher}: logits cannot be compared"
        )


def choose_device(name: str) -> str:
    """Return `name`; for "auto" cuda if available, otherwise cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch finds no CUDA device; use --device cpu")
    return name
