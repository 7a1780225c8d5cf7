"""Export a checkpoint to a bundle, measure it and try it: python examples/export_model.py CHECKPOINT OUT [TEXT].

Needs edgelm[export]. TEXT is calibration text of the model's domain; the default is self-generated text.
"""

import sys

import edgelm_export

import edgelm


def show_progress(what: str, done: int, total: int) -> None:
    """Print the progress of the export."""
    print(f"\r{what}: {done} of {total}\x1b[K", end="", file=sys.stderr)


if len(sys.argv) not in (3, 4):
    raise SystemExit("usage: python examples/export_model.py CHECKPOINT OUT [TEXT]")
checkpoint, out = sys.argv[1:3]
text = sys.argv[3] if len(sys.argv) == 4 else "self"

try:
    plan = edgelm_export.outline(checkpoint, quant="int4")
    print(f"plan: {len(plan.matrices)} matrices, {plan.bits_per_weight:.2f} bits per weight")
    bundle = edgelm_export.export(checkpoint, out, quant="int4", calibrate=text, progress=show_progress)
except edgelm.EdgelmError as error:
    raise SystemExit(str(error)) from error

check = bundle.manifest.self_check
print(f"\n{bundle.path}: {bundle.bytes / 1e6:.1f} MB")
if check is not None:
    print(
        f"perplexity {check['reference_perplexity']:.2f} -> {check['perplexity']:.2f}, KL {check['kl_mean']:.4f} nats"
    )
with edgelm.load(out) as lm:
    print(lm.generate("Once upon a time", max_tokens=16).text)
