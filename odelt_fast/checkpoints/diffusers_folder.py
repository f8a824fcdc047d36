"""What a folder of diffusers tells of a DiT beside its weights, checked: it is a stranger's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from odelt_fast.config import Latents, TrainedOn
from odelt_fast.files import one_line, read_object

_LIMIT = 1 << 20  # bytes of a JSON file
_NETWORK = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False, None),
    "norm_eps": (1e-5, 1e-6, None),
}
_NUMBERS = {"num_attention_heads": 16, "sample_size": 32, "num_embeds_ada_norm": 1000}
_NOISE = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class DiffusersFolder:
    """A pipeline's folder, or that of its transformer.

    `weights`: the file. `classes`: their number, without the null label.

    Raises:
        ValueError, OSError: there is none, or its network, or its noise, is another.
    """

    def __init__(self, path: Path) -> None:
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        self._pipeline = path if folder != path else None
        if not (folder / "config.json").is_file():
            raise ValueError("is not a file, and no folder of diffusers: it has no config.json")
        about = read_object(folder / "config.json", _LIMIT)
        for name, allowed in _NETWORK.items():
            if not any(about.get(name) is each or about.get(name) == each for each in allowed):
                raise ValueError(
                    f"{name} {one_line(repr(about.get(name)))} of its configuration: converted are"
                    f" those with {' or '.join(map(repr, allowed))}"
                )
        self._numbers = {name: about.get(name, usual) for name, usual in _NUMBERS.items()}
        for name, value in self._numbers.items():
            if type(value) is not int or not 0 < value < 1 << 24:
                raise ValueError(f"{name} {one_line(repr(value))} of its configuration")
        if self._numbers["sample_size"] >= 128:
            raise ValueError("its positions are interpolated (sample_size of 128 and above)")
        noise = self._of_pipeline("scheduler/scheduler_config.json")
        for name, value in _NOISE.items():
            if noise.get(name, value) != value:
                raise ValueError(
                    f"its scheduler has {name} {one_line(repr(noise[name]))}: the network's noise"
                    f" is that of {value!r}"
                )
        found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
        if not found:
            raise ValueError(f"no {' or '.join(_WEIGHTS)} in {folder.name}")
        self.weights, self.classes = found[0], self._numbers["num_embeds_ada_norm"]

    def _of_pipeline(self, name: str) -> dict[str, Any]:
        """A JSON file of the pipeline; empty where it is not there."""
        file = self._pipeline and self._pipeline / name
        return read_object(file, _LIMIT) if file and file.is_file() else {}

    def checked(self, num_heads: int | None, image_size: int | None) -> tuple[int, int]:
        """Heads and side of the network; ValueError where others are given."""
        heads, size = self._numbers["num_attention_heads"], self._numbers["sample_size"]
        for name, has, given in (("heads", heads, num_heads), ("image_size", size, image_size)):
            if given not in (None, has):
                raise ValueError(f"its configuration has {name} {has}, not {given}")
        return heads, size

    def trained_on(self, usual: Latents | None) -> TrainedOn:
        """The names of its classes and its autoencoder's latents, where the pipeline tells them.

        usual: latents where it does not.
        """
        vae, names = self._of_pipeline("vae/config.json"), self._of_pipeline("model_index.json")
        known = TrainedOn.taken_from({"id2label": names.get("id2label")}, self.classes)
        if usual and vae.get("scaling_factor") is not None:
            usual = Latents(vae["scaling_factor"], vae.get("shift_factor") or 0.0)
        return TrainedOn(known.class_names, usual)
