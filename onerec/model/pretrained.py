"""Folders with config.json and model.safetensors, on this machine or on the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.model.folder import CONFIG, WEIGHTS, read_config


class Pretrained(nn.Module, ModelHubMixin, library_name="onerec"):
    """A network that is made from one config dataclass and saved as two files.

    Gives `push_to_hub` by way of `huggingface_hub.ModelHubMixin`. A subclass sets `model_type` and
    `config_class`, takes the config as its only argument and keeps it as `self.config`.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type[Any]]
    config: Any

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Writes config.json and model.safetensors, each whole or not at all.

        Args:
            save_directory: Made if missing; other files in it stay.
            push_to_hub: Upload the folder as well; `kwargs` go to `push_to_hub` (`repo_id`, ...).

        Returns:
            The address of the commit when pushed, else None.

        Raises:
            OSError: The folder cannot be written.
        """
        folder = Path(save_directory)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(folder / WEIGHTS) as temporary:
            try:
                # One entry only: several are in no fixed order, and equal weights then differ.
                save_file(state, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{folder / WEIGHTS}: could not be written: {error}") from error
        config = {"model_type": self.model_type, **dataclasses.asdict(self.config)}
        with atomic_write(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            kwargs.setdefault("repo_id", folder.name)
            return str(self.push_to_hub(**kwargs))
        return None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Loads a folder that `save_pretrained` wrote, in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: A folder, or "user/name" of a repository on the Hub.
            kwargs: For a repository: arguments of `huggingface_hub.snapshot_download` (`revision`,
                `token`, `cache_dir`, `local_files_only`, ...).

        Raises:
            DataError: A file is missing, broken, of another model, or does not fit the other.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            name = str(pretrained_model_name_or_path)
            try:
                folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **kwargs))
            except HFValidationError:
                raise DataError(f"{name}: no such folder, nor a Hub repository's name") from None
            except Exception as error:
                raise DataError(
                    f"{name}: no such folder, and it could not be had from the Hub: {error}"
                ) from error
        config = cls.read_config(folder / CONFIG)
        least = getattr(config, "least_parameters", int)()
        if (folder / WEIGHTS).is_file() and (size := (folder / WEIGHTS).stat().st_size) < least:
            raise DataError(
                f"{folder / WEIGHTS}: not a whole safetensors file of this {CONFIG}: wanted at "
                f"least {least:,} bytes, got {size:,}"
            )
        model = cls(config)
        model._read_weights(folder / WEIGHTS)
        return model.eval()

    @classmethod
    def read_config(cls, path: Path) -> Any:
        """The config in a folder's config.json; see `onerec.model.folder.read_config`."""
        return read_config(path, cls.model_type, cls.config_class)

    def _read_weights(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{path}: missing; it should lie beside {CONFIG}")
        wanted = self.state_dict()
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                missing = sorted(wanted.keys() - found.keys())
                extra = sorted(found.keys() - wanted.keys())
                if missing or extra:
                    raise DataError(
                        f"{path}: not the weights of this {CONFIG}: "
                        f"missing {missing[:3]}, unexpected {extra[:3]}"
                    )
                for name, tensor in wanted.items():
                    if found[name] != list(tensor.shape):
                        raise DataError(
                            f"{path}: {name} must be {list(tensor.shape)}, got {found[name]}"
                        )
                # Copies: matrix products round by the alignment of their operands, and a file that
                # is replaced later does not matter to them.
                state = {name: file.get_tensor(name).clone() for name in wanted}
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: not a whole safetensors file: {error}") from error
        # Saved types are kept: a bfloat16 checkpoint loads as bfloat16.
        self.load_state_dict(state, assign=True)
