"""docs/exactness.md: for each class and for each kind of change, how many came out how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.exactness.compare import SAME_DB, STEPS, STRENGTH, Outcome

CHANGES, ALTERED = "changes", "altered"  # columns beside those of the outcomes
HEAD = """# Exactness

How small checkpoints of diffusers {version}'s own classes are read when a file of theirs is not what it was: an
option left out, added or of another value, a checkpoint that was saved long ago, two files that name different
schedulers. Each is one change to one JSON file; diffusers' own pipeline and ours make the first image of it from the
same noise in {steps} steps, and the images are compared (same: {same:g} dB PSNR at least, or as near as ours is to
itself with other rounding). This page is written by `make oracle` (`python -m tests.exactness`), which writes none
unless every class gives the same image without a change too; {how}.

- "Same image" is one of both sides; "altered" are those of them that are another image than without the change.
- "Refused by dexport" is a line that says why, before anything is written, of a checkpoint that diffusers draws with
  when it is asked what the unchanged one is.
- "Refused by both" is such a line where diffusers' pipeline cannot be made, or makes no image.
- "Diffusers fails" where we read the checkpoint and diffusers makes no image. So does a build: its reference was run on
  each of these, and ended in an error, or, for a class that starts from an image, left that task unproven and says
  so in the manifest.
- "Built all the same" is what diffusers cannot load as a whole, though a build's reference, diffusers' own pipeline
  without the weights of what we do not compute with, agrees: the damaged part is one that has no use.
- "Found by a build" is another image that we make than diffusers, and a build's reference ends there likewise. It is
  a misreading all the same: `make oracle` ends with exit code 1.
- "Silently different" is all else, a crash among it: exit code 1 too.

A build compares every checkpoint with diffusers' own pipeline anyway
([architecture](architecture.md#exactness-is-a-gate)): what is counted here is that the reading itself is right.

"""
MORE = """
By the kind of change:

"""
WRONG = """
Not the same image, where there should be one:

"""
APART = """
## What is compared, and what is not

- Each class by one request: a prompt, a class or noise alone, and the picture and the mask that it needs. Negative
  prompts, other settings, long prompts, LoRA and the like are for the tests of the families and for a build.
- Classes that are named after an image or a mask are compared as that. They start from an image at a strength of
  {strength:g}; those whose checkpoints have the parts of another class are told the guidance, of which each has another
  default, and models that were trained to inpaint have their own strength.
- ControlNet's and T2I-Adapter's classes with one network, at the scale that the class has by default.
- diffusers' `from_pretrained` no longer loads the published folders of unCLIP, Stable Cascade and Würstchen, whose
  libraries it has moved; their pipelines are made of their parts, each loaded by its own class.
- `StableDiffusionXLInpaintPipeline`, `StableDiffusionXLControlNetInpaintPipeline`, `StableDiffusionXLAdapterPipeline`
  and `AnimateDiffSDXLPipeline` leave out the mean of an autoencoder's latents on one side or both, and
  `StableDiffusion3InpaintPipeline` leaves out their shift as it decodes. We do not, and compare checkpoints without
  them there.

## Where we differ on purpose

- A caption is not cleaned (`clean_caption`), and a size is not rounded to a trained one (`use_resolution_binning`),
  as PixArt's and Sana's pipelines do by default.
- The default number of steps is smaller for Stable Diffusion and SDXL (20, where diffusers' 50 were for PNDM).
- Flux.1 schnell takes 256 tokens of T5, as its model card says; diffusers' default is 512.
- Kandinsky, Stable Cascade and Würstchen generate the size of their checkpoint by default, diffusers always 512
  pixels.
- A hint has a scale of 1 by default; diffusers' ControlNet classes have 0.8 from an image and 0.5 for Stable
  Diffusion's inpainting.
- TCD's `eta` is the scheduler's own default, 0.3, where nothing is said; diffusers' pipelines then call it with 0.
- An autoencoder gives the mode of its latents, not a draw of them; an image of another size is cropped
  ([images](images.md)).
"""


@dataclass(frozen=True)
class Change:
    """A change to a checkpoint, by its kind and its name, and what became of it."""

    kind: str
    name: str
    outcome: Outcome


@dataclass(frozen=True)
class Sweep:
    """What became of a class's checkpoint as it is, and of those of its ``total`` changes that were compared."""

    pipeline: str
    task: str
    unchanged: Outcome
    changes: tuple[Change, ...]
    total: int

    def counts(self) -> dict[str, int]:
        """How many changes came out how."""
        return _counts([change.outcome for change in self.changes])

    def wrong(self) -> list[str]:
        """A line for each change that gives another image."""
        found = [change for change in self.changes if change.outcome.what in Outcome.WRONG]
        return [f"`{self.pipeline}`, {change.name}: {change.outcome.what}, {change.outcome.how}" for change in found]


def page(sweeps: Sequence[Sweep], every: int, version: str) -> str:
    """The page's text; ``every``: of each class, every so many changes were compared."""
    total, compared = sum(sweep.total for sweep in sweeps), sum(len(sweep.changes) for sweep in sweeps)
    how = f"all {total} changes were compared"
    if compared < total:
        how = f"here {compared} of {total} changes were compared, one of {every} of each class"
    rows = {_row(sweep): sweep.counts() for sweep in sweeps}
    kinds: dict[str, list[Outcome]] = {}
    for change in (change for sweep in sweeps for change in sweep.changes):
        kinds.setdefault(change.kind, []).append(change.outcome)
    by_kind = {kind: _counts(kinds[kind]) for kind in sorted(kinds)}
    text = HEAD.format(version=version, steps=STEPS, same=SAME_DB, how=how)
    text += _table("pipeline class", rows) + MORE + _table("change", by_kind)
    if lines := [line for sweep in sweeps for line in sweep.wrong()]:
        text += WRONG + "".join(f"- {line}\n" for line in lines)
    return text + APART.format(strength=STRENGTH)


def _row(sweep: Sweep) -> str:
    return f"`{sweep.pipeline}`" + (f", {sweep.task}" if sweep.task else "")


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many outcomes there are in all, and of each kind; of the first kind also how many are altered."""
    counts = {what: sum(outcome.what == what for outcome in outcomes) for what in Outcome.KINDS}
    altered = sum(outcome.what == Outcome.SAME and outcome.altered for outcome in outcomes)
    return {CHANGES: len(outcomes), Outcome.SAME: counts.pop(Outcome.SAME), ALTERED: altered, **counts}


def _table(first: str, rows: Mapping[str, Mapping[str, int]]) -> str:
    """A table with a line of sums at its end."""
    columns = list(next(iter(rows.values())))
    sums = {column: sum(counts[column] for counts in rows.values()) for column in columns}
    lines = [f"| {first} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, counts in {**rows, "all": sums}.items():
        lines.append(f"| {name} | " + " | ".join(map(str, counts.values())) + " |")
    return "\n".join(lines) + "\n"
