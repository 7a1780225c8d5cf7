"""From a data file to a checkpoint directory: tokenizer, student, training, and only then a name in OUT.

While training, everything lives in `OUT.partial`, beside OUT; OUT appears complete, by one rename.
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
from .score_student import evaluate
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
"""What is copied from a teacher's or student's directory, where it is there; the first must be."""


@dataclass(frozen=True, slots=True)
class InitialStudent:
    """What training starts from.

    Parameters
    ----------
    model
        The student, fp32.
    tokenizer
        Its tokenizer.
    eos
        Tokens that end an answer; the first is trained.
    write_tokenizer
        Writes the tokenizer's files into a directory.
    """

    model: Any
    tokenizer: Tokenizer
    eos: list[int]
    write_tokenizer: Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class DistillResult:
    """What a run came to. `score` is on examples that were held out of training; None where there were none."""

    progress: TrainingProgress
    settings: TrainingSettings
    score: TaskScore | None


MIN_EXAMPLES_FOR_HOLD_OUT: Final = 40
"""From so many examples on some are held out: a tenth, at most `MAX_HELD_OUT`."""
MAX_HELD_OUT: Final = 500


def split_held_out(tasks: Sequence[Task], count: int | None, seed: int) -> tuple[list[Task], list[Task]]:
    """Divide tasks into those to train on and `count` to score with, drawn by the seed; None is a tenth of enough.

    No prompt is in both: of several tasks with one prompt that is drawn, the first counts. Raises `ConfigError` where
    nothing would be left to train on.
    """
    prompts = list(dict.fromkeys(task.prompt for task in tasks))
    if count is None:
        count = min(len(prompts) // 10, MAX_HELD_OUT) if len(prompts) >= MIN_EXAMPLES_FOR_HOLD_OUT else 0
    if not 0 <= count < len(prompts):
        raise ConfigError(f"held-out {count}: of {len(prompts)} prompts at least one must be left to train on")
    drawn = {prompts[i] for i in np.random.default_rng([seed, 2]).permutation(len(prompts))[:count]}
    unseen = {task.prompt: task for task in reversed(tasks) if task.prompt in drawn}
    return [task for task in tasks if task.prompt not in drawn], list(unseen.values())


def distill(
    student: str,
    data: Path,
    out: Path,
    given: Mapping[str, Any],
    *,
    held_out: int | None = None,
    threads: int | None = None,
    teacher: Path | None = None,
    vocab_size: int = 2048,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    report: Callable[[TrainingProgress], None] = lambda _: None,
    told: Callable[[str], None] = lambda _: None,
) -> DistillResult:
    """Train a student on tasks and write it to `out` as a Hugging Face directory.

    Parameters
    ----------
    student
        A checkpoint directory to go on from, or a shape (see `parse_shape`) to start from random weights. A new
        student shares the teacher's tokenizer, and its weights where it differs in the number of layers alone (see
        `inherit_layers`); without a teacher it gets a tokenizer of its own, trained on the data.
    data
        JSONL of `{"prompt", "target"}`; see `edgelm.evaluation.tasks.read_tasks`.
    out
        Directory to make.
    given
        Fields of `TrainingSettings`; row length, batch and epochs that are not among them are chosen to suit the data.
    held_out
        How many examples are kept from training, to score the student with; see `split_held_out`.
    threads
        Threads to multiply with; None measures which number is quickest. Sums differ in their last digits with it.
    teacher
        Checkpoint directory whose logits the student follows; None: plain supervised training.
    vocab_size
        Of a newly trained tokenizer.
    resume
        Go on from `out`.partial where there is one.
    force
        Replace `out` and discard `out`.partial.
    report, told
        Called with where the run stands, and with a line on what is being done beside training.

    Raises
    ------
    DataError, CheckpointError, ConfigError
        Something given is not what it should be; `out` is then as it was.
    """
    prepare_target(out, resume=resume, force=force)
    tasks, unseen = split_held_out(read_tasks(data), held_out, int(given.get("seed") or 0))
    teacher_model = load_transformers_model(teacher, "teacher") if teacher else None
    tokenizer = _tokenizer(student, tasks, teacher, vocab_size)
    lengths = [len(each.tokens) for each in encode_tasks(tokenizer, tasks, 0, sys.maxsize)]
    settings = fit_settings(lengths, given)
    start = _start(student, tokenizer, teacher, settings)
    if teacher is not None:
        _check_same_vocabulary(start, teacher, teacher_model)
    examples = encode_tasks(start.tokenizer, tasks, start.eos[0], settings.row_length)
    if teacher_model is not None and settings.teacher_top_k:
        examples = add_teacher_targets(teacher_model, examples, settings, device)
        teacher_model = None
    torch.set_num_threads(threads or _best_threads(start.model, examples, settings, device, told))
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
    told(f"answering {len(unseen)} held-out prompts")
    return DistillResult(progress, settings, evaluate(start.model, start.tokenizer, unseen))


def _best_threads(
    model: Any, examples: Sequence[EncodedExample], settings: TrainingSettings, device: str, told: Callable[[str], None]
) -> int:
    """Return the number of threads with which a step takes least time now, beside whatever else runs here."""
    most = int(torch.get_num_threads())
    if device != "cpu" or most == 1:
        return most
    told("measuring how many threads are quickest")
    rows = max(1, settings.batch_tokens // settings.row_length)
    batch = make_batches(examples, settings.row_length, rows, np.random.default_rng(0))[0]
    seconds: dict[int, float] = {}
    for count in sorted({1, *(2**power for power in range(1, 6) if 2**power < most), most}):
        torch.set_num_threads(count)
        seconds[count] = min(_step_seconds(model, batch) for _ in range(3))
        if seconds[count] > 1.5 * min(seconds.values()):
            break  # more will not help either
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
    with staged_directory(out, force=True, replaceable=_is_checkpoint) as stage:  # claimed before
        save_student(start.model, stage, start.eos)
        start.write_tokenizer(stage)
    shutil.rmtree(partial)
    return trainer.progress


def partial_directory(out: Path) -> Path:
    """Return the directory that holds a run's checkpoint until it is done."""
    return out.with_name(out.name + ".partial")


def prepare_target(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse an existing `out`, and the remains of a run, unless told what to do with them.

    Raises
    ------
    EdgelmError
        There is something that neither `resume` nor `force` covers.
    """
    check_target(out, force=force, replaceable=_is_checkpoint)
    partial = partial_directory(out)
    if partial.exists() and not resume:
        if not force:
            raise ConfigError(f"{partial} holds an unfinished run: --resume goes on with it, --force discards it")
        shutil.rmtree(partial)


def _is_checkpoint(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def hash_parts(*parts: str | bytes) -> str:
    """Return the SHA-256 of all parts, hex; it names a run's data and settings."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _tokenizer(student: str, tasks: Sequence[Task], teacher: Path | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of the student that is named, of the teacher, or a new one."""
    if Path(student).is_dir():
        return open_tokenizer(Path(student))
    if "=" not in student:
        raise ConfigError(f"student {student!r} is neither a directory nor a shape such as hidden=192,layers=6,heads=6")
    parse_shape(student)
    if teacher is not None:
        return open_tokenizer(teacher)
    return train_tokenizer([text for task in tasks for text in (task.prompt, task.target)], vocab_size)


def _start(student: str, tokenizer: Tokenizer, teacher: Path | None, settings: TrainingSettings) -> InitialStudent:
    """Open the student that is named, or make the one that is described."""
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
    """Take the tokenizer's files and end tokens from `directory`, whose model is `owner`."""
    eos = owner.generation_config.eos_token_id
    if eos is None:
        eos = owner.config.eos_token_id
    if eos is None:
        raise CheckpointError(f"{directory} names no end token: eos_token_id in generation_config.json is missing")

    def copy(to: Path) -> None:
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, to / name)

    return InitialStudent(model, tokenizer, eos if isinstance(eos, list) else [eos], copy)


def open_tokenizer(directory: Path) -> Tokenizer:
    """Open tokenizer.json of a checkpoint directory, without truncation or padding."""
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
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
    """Return `name`, or for "auto" cuda where there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch sees no CUDA device; use --device cpu")
    return name
