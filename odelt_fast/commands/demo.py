"""`odelt-fast demo`: a page to play with a model."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .options import Device, Dtype, Text, load, load_decoder

_FIRST_SECONDS = 5.0  # spent on latencies for the plot before the page is there


@dataclass(frozen=True)
class Command:
    """Serve a page to play with a model in a browser: dials for l and T, pictures with what they
    cost, quality against latency."""

    model: str = "digits"
    """Folder of a model, name of a bundled one, or Hub id (user/repo)."""
    quality: Text = None
    """Folder of odelt-fast evaluate, or its results.json, for the plot; by default the quality.json
    in the model's folder."""
    metric: Text = None
    """What to plot of it, as the table names it; its first metric by default."""
    num_images: int = 10
    """Images of a picture, at most 64."""
    decoder: Text = None
    """Autoencoder that makes pictures of a model's latents: folder or Hub id."""
    any_decoder: bool = False
    """Also an autoencoder of other latents than the model was trained on."""
    device: Device = "auto"
    """auto: cuda if there is a GPU."""
    dtype: Dtype = "auto"
    """auto: bfloat16 on a GPU and on CPUs that compute in it, else float32."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine only; 0.0.0.0 from every
    network it is in."""
    port: int = 7860
    """0: any free one."""
    waiting: int = 16
    """Requests that may wait for their turn; those above it are told that the page is busy."""
    max_seconds: float = 60.0
    """A picture that takes longer is given up."""


def run(options: Command) -> None:
    """Serves until Ctrl-C; mistakes are raised."""
    if not 1 <= options.num_images <= 64:
        raise ValueError(f"--num-images must be from 1 to 64, not {options.num_images}")
    if not 1 <= options.waiting <= 1000:
        raise ValueError(f"--waiting must be from 1 to 1000, not {options.waiting}")
    if not 0 < options.max_seconds <= 3600:
        raise ValueError(
            f"--max-seconds must be above 0 and at most 3600, not {options.max_seconds:g}"
        )
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

    from odelt_fast.demo.app import LOOPBACK, serve
    from odelt_fast.demo.page import build_page, import_gradio
    from odelt_fast.serving.listening import listen, url_of

    import_gradio()
    with listen(options.host, options.port) as listener:
        from odelt_fast.checkpoints.folder import read_config
        from odelt_fast.demo.studio import Studio, measured_operations
        from odelt_fast.evaluation.machine import model_hash
        from odelt_fast.planning.evidence import find_quality

        name, quality, metric = options.model, None, None
        config = read_config(name)
        table = find_quality(name, config, model_hash(name), options.quality)
        if table is None and options.metric is not None:
            raise ValueError(
                f"--metric {options.metric}: {name} has no table of quality, give --quality"
            )
        if table is not None:
            metric = table.metric(options.metric)
            quality = measured_operations(config, table, metric)
        model = load(name, options.device, options.dtype, None)
        decoder = load_decoder(options.decoder, model, options.any_decoder)
        if decoder is None and config.channels not in (1, 3):
            raise ValueError(
                f"{name} makes latents of {config.channels} channels: give the --decoder of them"
            )
        studio = Studio(
            model, decoder=decoder, num_images=options.num_images, max_seconds=options.max_seconds
        )
        studio.measure(quality or (), _FIRST_SECONDS)
        blocks = build_page(studio, name, quality=quality, metric=metric, waiting=options.waiting)
        local = listener.getsockname()[0] in LOOPBACK
        reach = "" if local else ", to be reached by other machines too"
        print(f"{url_of(listener)} shows {name}{reach}; Ctrl-C ends it", flush=True)
        serve(blocks, listener)
