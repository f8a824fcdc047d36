"""The diffusers pipeline of these models (extra `diffusers`), with the conventions of diffusers'
own DiTPipeline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from odelt_fast.checkpoints.folder import load_model, save_model, stored_dtype
from odelt_fast.checkpoints.lookup import DOWNLOAD_OPTIONS
from odelt_fast.checks import dtype_of, one_of, whole
from odelt_fast.config import DiTConfig, Latents
from odelt_fast.images.encode import latents_of
from odelt_fast.model import DiT
from odelt_fast.sampling.decoder import Decoder, Overlapped
from odelt_fast.sampling.labels import ids_of_names, whole_labels
from odelt_fast.sampling.noise import stack_noise
from odelt_fast.sampling.pictures import in_form
from odelt_fast.sampling.sampler import Sampler

try:
    from diffusers.models import AutoencoderKL, AutoencoderTiny  # type: ignore[attr-defined]
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError:
    raise ImportError(
        "OdeltPipeline needs diffusers: pip install 'odelt-fast[diffusers]'"
    ) from None

# Keywords of `from_pretrained` that say how the Hub's files are downloaded.
_DOWNLOAD = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "token",
    "use_safetensors", "variant",
)  # fmt: skip
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What a saved pipeline carries for diffusers' `custom_pipeline`, file -> the one class in it. The
# second name is the one that diffusers looks for in the folder of a component of another library.
# `OdeltPipeline.from_pretrained` runs neither.
CARRIED_CODE = {
    "pipeline.py": "OdeltPipeline",
    "transformer/odelt_fast.pipeline.py": "OdeltTransformer",
}
# Arguments of other pipelines' calls, and what takes their place here.
_ON_THE_WAY = "the steps run as one: odelt_fast.trajectory gives the states on the way"
_ELSEWHERE = {
    "callback": _ON_THE_WAY,
    "callback_steps": _ON_THE_WAY,
    "callback_on_step_end": _ON_THE_WAY,
    "num_images_per_prompt": "repeat the class in class_labels, once for each image",
    "negative_prompt": "the null label takes its place: guidance_scale",
    "timesteps": "time_grid ('uniform', 'shift:3.0') says where the steps lie",
    "sigmas": "time_grid ('uniform', 'shift:3.0') says where the steps lie",
    "eta": "no step draws noise: leave it out",
    "steps": "it is called num_inference_steps",
}
_SAMPLER = (
    *("solver", "rtol", "atol", "max_steps", "error_norm", "time_grid", "depth_schedule"),
    *("backend", "batch_size", "attention", "precision", "plan"),
)
_CODE = '''"""With odelt-fast installed: DiffusionPipeline.from_pretrained(here, \
custom_pipeline=here, trust_remote_code=True)."""

from odelt_fast.pipeline import {name}

__all__ = ["{name}"]
'''


class OdeltTransformer(ModelMixin):
    """A DiT, `model`, for diffusers to save, load, move and offload. Its files are those of every
    model: config.json, model.safetensors."""

    _supports_group_offloading = False

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> DiTConfig:
        return self.model.config

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """The velocity field, as `DiT.forward`."""
        return self.model(*arguments, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> OdeltTransformer:
        """Loads a model as `load_model` does. device_map: a device, or {"": device}. torch_dtype is
        what diffusers calls dtype. options: how a Hub id is downloaded; diffusers' others have no
        meaning here."""
        if options.get("quantization_config") is not None:
            raise ValueError("quantization_config is not supported: precision='fp8' of a call is")
        device = device_map.get("", "cpu") if isinstance(device_map, dict) else device_map
        place = "cpu" if device is None else device
        download = {name: options[name] for name in DOWNLOAD_OPTIONS if name in options}
        name = pretrained_model_name_or_path
        return cls(load_model(name, place, dtype or torch_dtype, download=download))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Saves the model as `save_model` does."""
        save_model(self.model, save_directory)


class OdeltPipeline(DiffusionPipeline):
    """Class labels -> images, at any depth and number of steps.

    >>> pipe = OdeltPipeline.from_pretrained("user/repo", dtype=torch.bfloat16).to("cuda")
    >>> seeded = torch.manual_seed(0)
    >>> pipe(class_labels=[207, 360], depth=4, num_inference_steps=1, generator=seeded).images[0]

    transformer: the model. vae: AutoencoderKL (or AutoencoderTiny, for previews) of a model of
    latents; None for a model of pixels. id2label: class -> its names, separated by commas; None:
    those that are stored with the model. any_decoder: take a vae of other latents than the model
    was trained on, too. There is no scheduler: `solver` of a call takes its place.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        transformer: OdeltTransformer | DiT,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        any_decoder: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, OdeltTransformer | DiT):
            raise ValueError(
                "transformer must be a DiT, as load_model returns, not"
                f" {type(transformer).__name__}"
            )
        if isinstance(transformer, DiT):
            transformer = OdeltTransformer(transformer)
        self.register_modules(transformer=transformer, vae=vae)
        if id2label is None and transformer.model.trained_on.class_names:
            id2label = dict(enumerate(transformer.model.trained_on.class_names))
        self.register_to_config(id2label=id2label, any_decoder=any_decoder)
        self._known_vae: tuple[Any, Latents] | None = None
        if vae is not None:
            self._decoder(transformer.model)
        self.labels = ids_of_names(id2label or {}, transformer.model.config.num_classes)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Classes of names, for `class_labels`. ValueError for a name that `labels` does not
        have."""
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in self.labels:
                known = ", ".join(list(self.labels)[:10]) or "it has none: give it id2label"
                raise ValueError(
                    f"{name!r} names no class of this pipeline"
                    f" ({known}{', ...' if len(self.labels) > 10 else ''})"
                )
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float | None = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        depth: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each label.

        class_labels: classes from 0; the number of classes is the null label. guidance_scale w:
        v_null + w (v_label - v_null) where w > 1, labels alone otherwise (the default: these models
        are trained for few steps, in which w = 4 does harm). generator: of the noise, one or one
        for each image; None draws from torch's global one. seed, in its place: the noise of
        `Sampler` and of `odelt-fast sample`, where image i depends on (seed, i) alone.
        num_inference_steps: time steps T. depth: active blocks l; None: all. output_type: "pil";
        "np" (N, H, W, C) or "pt" (N, C, H, W) in [0, 1]; "latent": what the solver leaves,
        undecoded. options: those of Sampler (solver, rtol, atol, batch_size, backend, ...); also
        latents (N, C, h, w), the noise itself, or height and width of the images.

        Returns ImagePipelineOutput, or the tuple (images,) if not return_dict. Raises ValueError
        for what cannot be used.
        """
        one_of("output_type", output_type, OUTPUT_TYPES)
        latents, *size = (options.pop(name, None) for name in ("latents", "height", "width"))
        _check_options(options)
        if seed is not None and generator is not None:
            raise ValueError("generator and seed are both given: leave one out")
        compiled = hasattr(self.transformer, "_orig_mod")  # torch.compile was put around it
        model: DiT = (self.transformer._orig_mod if compiled else self.transformer).model
        config = model.config
        if output_type != "latent" and self.vae is None and config.channels not in (1, 3):
            raise ValueError(
                f"{config.channels} channels are latents: give the pipeline a vae, or ask for"
                " output_type='latent'"
            )
        labels = whole_labels(class_labels)
        drawing = generator if isinstance(generator, list) else [generator]
        if not all(each is None or isinstance(each, torch.Generator) for each in drawing):
            raise ValueError(
                "generator must be a torch.Generator, or one for each image; or seed=3"
            )
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(
                f"{len(generator)} generators for {len(labels)} images: give one, or all"
            )
        self._onload(self.transformer)
        decoder = None if self.vae is None or output_type == "latent" else self._decoder(model)
        factor = 1 if self.vae is None else Decoder(self.vae, any_latents=True).factor
        shape = _shape_of(model, size, factor)
        if latents is not None and size != [None, None]:
            raise ValueError("latents have a height and width of their own: leave these out")
        noise = latents
        if latents is None and seed is None:
            drawn = (len(labels), *shape)
            noise = randn_tensor(drawn, generator, model.device, torch.float32)
        elif latents is None and seed is not None and shape != config.image_shape:
            noise = stack_noise(seed, range(len(labels)), shape)
        if seed is None:
            seed = _seed_of(generator) if config.sampling == "consistency" else 0
        # An offloaded autoencoder sends the transformer away when it starts: then all is sampled
        # first.
        overlapped = Overlapped(decoder) if decoder and not hasattr(self.vae, "_hf_hook") else None
        options = ({"backend": "compile"} if compiled else {}) | options
        options["guidance_scale"] = guidance_scale if (guidance_scale or 0) > 1 else None
        sampler = Sampler(model, depth, num_inference_steps, decoder=overlapped, **options)
        total = math.inf if sampler.operation.adaptive else len(labels) * num_inference_steps
        with self.progress_bar(total=total) as bar:
            images = sampler(len(labels), labels, seed, noise=noise, progress=bar.update)
        if overlapped:
            images = overlapped.images()
        elif decoder:
            self._onload(self.vae)
            images = decoder(images)
        self.maybe_free_model_hooks()
        finished: Any = images if output_type == "latent" else in_form(images, output_type)
        return ImagePipelineOutput(images=finished) if return_dict else (finished,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:  # type: ignore[override]
        """Loads a saved pipeline from a folder or the Hub, with the options of every diffusers
        pipeline. Runs no code of the folder."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            download = {name: options[name] for name in _DOWNLOAD if name in options}
            folder = Path(cls.download(str(pretrained_model_name_or_path), **download))
        if folder.is_dir() and not (folder / "model_index.json").exists():
            raise ValueError(
                f"{folder} holds no pipeline: make one, OdeltPipeline(load_model(...))"
            )
        for name in ("dtype", "torch_dtype"):
            if options.get(name) is not None:
                options[name] = _dtypes(options[name], folder)
        if options.get("transformer") is None:
            dtype, place = (
                options.get("dtype") or options.get("torch_dtype"),
                options.get("device_map"),
            )
            if isinstance(dtype, dict):
                dtype = dtype.get("transformer", dtype.get("default"))
            options["transformer"] = OdeltTransformer.from_pretrained(
                folder / "transformer",
                dtype=dtype,
                device_map=None if place == "balanced" else place,
            )
        return super().from_pretrained(folder, **options)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:  # type: ignore[override]
        """Saves as every pipeline does, and the code that `custom_pipeline` wants. A variant is in
        the name of the vae's file; the transformer's is model.safetensors whatever the variant, and
        one file."""
        if not (args[0] if args else options.get("safe_serialization", True)):
            raise ValueError("weights are always safetensors: leave safe_serialization out")
        for file, name in CARRIED_CODE.items():
            path = Path(save_directory) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_CODE.format(name=name))
        super().save_pretrained(str(save_directory), *args, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError("there is no scheduler: solver, of a call, takes its place")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            raise ValueError("there is no scheduler to set: solver, of a call, takes its place")
        super().__setattr__(name, value)

    def enable_vae_slicing(self) -> None:
        """The vae decodes one image at a time."""
        self._vae_can("slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """The vae decodes several images at a time again."""
        self._vae_can("slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """The vae decodes large images in tiles."""
        self._vae_can("tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """The vae decodes whole images again."""
        self._vae_can("tiling").disable_tiling()

    def _vae_can(self, what: str) -> Any:
        if self.vae is None:
            raise ValueError(f"this pipeline has no vae, whose {what} could be switched")
        return self.vae

    def set_attention_slice(self, slice_size: Any) -> None:
        """For the vae, where it can; the transformer's attention never holds a matrix to slice."""
        if slice_size is not None:
            warnings.warn("attention slicing has no effect on the transformer", stacklevel=3)
        super().set_attention_slice(slice_size)

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Any = None
    ) -> None:
        """For the vae."""
        if valid:
            warnings.warn("attention= of a call chooses the transformer's attention", stacklevel=3)
        super().set_use_memory_efficient_attention_xformers(valid, attention_op)

    def enable_sequential_cpu_offload(self, *arguments: Any, **options: Any) -> None:
        """ValueError: weights that come and go block by block are not supported."""
        raise ValueError(
            "enable_sequential_cpu_offload is not supported: use enable_model_cpu_offload"
        )

    def _decoder(self, model: DiT) -> Decoder:
        """The decoder of the vae; ValueError if it is for other latents than the model's."""
        vae, any_vae = self.vae, bool(self.config["any_decoder"])
        if model.trained_on.latents is None or isinstance(vae, AutoencoderTiny) or any_vae:
            return Decoder(vae, any_latents=True)
        if self._known_vae is None or self._known_vae[0] is not vae:
            self._known_vae = vae, latents_of(vae, "")  # its folder is not the name of its encoder
        decoder = Decoder(vae, latents=self._known_vae[1])
        decoder.check_latents(model.trained_on.latents)
        return decoder

    def _onload(self, module: Any) -> None:
        """Moves a module of `enable_model_cpu_offload` to the GPU, which its hook does only at a
        call of its forward."""
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(module)


def _dtypes(dtype: Any, folder: Path) -> Any:
    """dtype of `from_pretrained`, or a dict of them by part, as torch's; "auto" is that of the
    transformer's files."""
    if isinstance(dtype, dict):
        return {part: _dtypes(value, folder) for part, value in dtype.items()}
    return stored_dtype(folder / "transformer") if dtype == "auto" else dtype_of(dtype)


def _check_options(options: Mapping[str, Any]) -> None:
    """ValueError for an argument of a call that has no meaning here, saying what has."""
    for name in options:
        if name not in _SAMPLER:
            advice = f"allowed are latents, height, width, {', '.join(_SAMPLER)}"
            raise ValueError(f"{name} is no argument here: {_ELSEWHERE.get(name, advice)}")


def _shape_of(model: DiT, size: Sequence[int | None], factor: int) -> tuple[int, int, int]:
    """(C, H, W) of the noise for images of height and width (None: the model's own)."""
    config, unit = model.config, factor * model.config.patch_size
    sides = []
    for name, given, own in zip(("height", "width"), size, config.image_shape[1:], strict=True):
        side = own * factor if given is None else whole(name, given)
        if side % unit:
            raise ValueError(f"{name} {side} is not a multiple of {unit}")
        sides.append(side // factor)
    return config.channels, sides[0], sides[1]


def _seed_of(generator: torch.Generator | list[torch.Generator] | None) -> int:
    """A seed for what the Sampler draws itself: the noise that consistency models add at every
    step."""
    first = generator[0] if isinstance(generator, list) else generator
    return int(torch.randint(2**62, (1,), generator=first, device=first.device if first else None))
