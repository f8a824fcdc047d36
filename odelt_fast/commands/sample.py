"""`odelt-fast sample`: pictures of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from odelt_fast.checks import check_seed
from odelt_fast.files import check_target, picture_formats, save_picture, try_out, write_whole

from .budgets import choice_json, choose_for
from .operations import operation_of
from .options import check_counts, check_guidance, labels_in_turn, load, load_decoder, plural
from .sample_options import Command, check_modes

if TYPE_CHECKING:
    from odelt_fast.planning.planner import Choice
    from odelt_fast.sampling.sampler import Sampler


def run(options: Command) -> None:
    """Runs it; mistakes are raised."""
    check_counts(options, "steps", "num_images", "batch_size", "max_steps")
    check_seed(options.seed, "--seed")
    check_modes(options)
    operation = operation_of(options)
    picture = Path("samples.png") if options.out is None and options.npz is None else options.out
    if picture is not None:
        check_target("--out", picture, picture_formats())
    if options.npz is not None:
        check_target("--npz", options.npz, (".npz",))
    chosen = choose_for(options)
    if chosen:
        operation = chosen.operation
        options = replace(options, batch_size=chosen.candidate.batch)

    import numpy as np
    from tqdm import tqdm

    from odelt_fast.sampling.noise import drawn_labels
    from odelt_fast.sampling.pictures import image_grid, to_uint8
    from odelt_fast.sampling.sampler import Sampler

    from .flows import channels_last, plan

    model = load(options.model, options.device, options.dtype, operation.deepest)
    decoder = load_decoder(options.decoder, model, options.any_decoder)
    sampler = Sampler.of(model, operation, batch_size=options.batch_size, decoder=decoder)
    config = model.config
    channels, *size = config.image_shape
    if decoder:
        channels, size = decoder.channels, [side * decoder.factor for side in size]
    chosen_labels = labels_in_turn(options, model)
    if options.interpolate is not None and len(chosen_labels) > 1:
        raise ValueError(f"--interpolate draws one class, not {len(chosen_labels)} --labels")
    if options.invert is None:
        drawn = chosen_labels or [0] * (config.num_classes > 1)
        check_guidance(options.guidance_scale, {*drawn} <= {config.num_classes})
    labels = np.resize(chosen_labels, options.num_images) if chosen_labels else None
    planned = plan(options, sampler, labels)
    if picture is not None:
        blank = np.broadcast_to(np.uint8(0), (planned.tiles, *size, channels))
        try_out("--out", picture, image_grid(blank, planned.columns))
    hidden = True if options.quiet or options.json else None  # None: shown on a terminal only
    steps = None if operation.adaptive else planned.steps
    with tqdm(total=steps, unit="step", leave=False, disable=hidden) as bar:
        drawing = planned.draw(bar.update)
    written = []
    if options.npz is not None:
        images = drawing.images
        shown = to_uint8(images) if channels in (1, 3) else channels_last(images)
        labels = drawing.labels
        if labels is None:
            labels = drawn_labels(options.seed, range(len(images)), config.num_classes)
        arrays = {"arr_0": shown, "arr_1": labels, **drawing.arrays}
        write_whole(options.npz, lambda file: np.savez(file, **arrays))
        written.append(options.npz)
    if picture is not None:
        save_picture(picture, image_grid(to_uint8(drawing.tiles), drawing.columns))
        written.append(picture)
    report(options, sampler, config.depth, written, chosen)
    if drawing.remark and not options.json:
        print(drawing.remark)


def report(
    options: Command, sampler: Sampler, blocks: int, written: Sequence[Path], chosen: Choice | None
) -> None:
    """Prints what was drawn, where it is, and what it cost (without loading the model)."""
    about, stats = sampler.explain(), sampler.stats
    count, seconds = stats["images"], stats["seconds"] / stats["images"]
    if options.json:
        about = {
            "files": list(map(str, written)),
            "model": options.model,
            "seed": options.seed,
            "num_images": count,
            "evaluations": stats["evaluations"],
            "seconds_per_image": seconds,
        } | about
        if chosen:
            about["choice"] = choice_json(chosen)
        print(json.dumps(about))
        return
    print(f"{' and '.join(map(str, written))}: {plural(count, 'image')} of {options.model}")
    if chosen:
        print(chosen.why)
    used = f"{about['live_blocks']} of {plural(blocks, 'block')}"
    taken = [a + r for a, r in zip(stats["accepted"], stats["rejected"], strict=True)]
    steps = plural(sampler.operation.steps or taken[0], "step")
    if sampler.operation.adaptive and min(taken) < max(taken):
        steps = f"{min(taken)} to {max(taken)} steps"
    print(f"depth {about['depth']} ({used}), {steps} of {about['solver']}")
    print(
        f"{plural(round(stats['evaluations_per_image']), 'evaluation')} and {seconds:.3g} s per"
        f" image on {about['device']} in {about['dtype']}"
    )
