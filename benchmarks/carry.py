"""Carries a Hugging Face checkpoint to a machine without a network, as pieces that are small enough for its transfers.

    python benchmarks/carry.py split --model MODEL_DIR --pieces PIECES_DIR --bits 5      # here
    python benchmarks/carry.py join --pieces PIECES_DIR --model MODEL_DIR                # there, once all pieces are

`split` writes piece_000.bin, piece_001.bin, ... of at most --mib MiB and manifest.json into PIECES_DIR. `join` compares
size and SHA-256 of every piece and of every file with the manifest, names the pieces that are missing or damaged, and
writes MODEL_DIR whole or not at all. The pieces may arrive in any order and in any number of transfers.

--bits 16 carries the files as they are. With --bits 4, 5, 6 or 8, each block of 32 numbers of a matrix is carried as
integers of so many bits, with the minimum and the step of the block in float16: one bit a weight more. Embedding and
head always have 8 bits, and vectors are carried as they are. After `join` tensors have the names, shapes and dtypes
that they had. A checkpoint whose weights were integers of 4 or 5 bits before, such as one from a GGUF file, loses next
to nothing with as many bits. The last line is one JSON object: `pieces`, `mib` in total, and how far rounding is from
the weights, as the root mean square of the differences by that of the weights: `error` (mean over the matrices) and
`largest_error` (of one matrix).
"""

import argparse
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, without which safetensors cannot return such tensors)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

BLOCK = 32  # numbers that have a minimum and a step in common
MANIFEST = "manifest.json"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
FLOATS = ("float32", "float16", "bfloat16")


def quantize(weights: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Returns the parts of a float array: `codes` [blocks, 4 * bits] uint8, `low` and `step` [blocks] float16.

    A weight is about low + step * code. With up to 6 bits each block has the best of several steps, so that weights
    that were integers of so few bits before, times a step of their block, are found again.
    """
    flat = np.asarray(weights, np.float32).ravel()
    blocks = np.pad(flat, (0, -len(flat) % BLOCK), mode="edge").reshape(-1, BLOCK)
    most, low = 2**bits - 1, blocks.min(axis=1).astype(np.float16)
    above = blocks - low.astype(np.float32)[:, None]
    least_error = np.full(len(blocks), np.inf, np.float32)
    codes, step = np.zeros(blocks.shape, np.uint8), np.zeros(len(blocks), np.float16)
    for levels in range(most, most // 2 if bits <= 6 else most - 1, -1):
        tried = (above.max(axis=1) / levels).astype(np.float16)
        size = tried.astype(np.float32)[:, None]
        rounded = np.clip(np.rint(above / np.where(size > 0, size, 1)), 0, most)
        error = np.square(rounded * size - above).sum(axis=1)
        better = error < least_error
        least_error[better], step[better], codes[better] = error[better], tried[better], rounded[better]
    if not (np.isfinite(low).all() and np.isfinite(step).all()):
        raise SystemExit("a weight is not finite or above 65504, which float16 lacks; use --bits 16")
    if bits < 8:
        codes = np.packbits(np.unpackbits(codes[..., None], axis=-1)[..., 8 - bits :].reshape(len(codes), -1), axis=-1)
    return {"codes": codes, "low": low, "step": step}


def dequantize(parts: dict[str, np.ndarray], bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the float32 array of this shape whose parts `quantize` returned."""
    codes = parts["codes"]
    if bits < 8:
        digits = np.unpackbits(codes, axis=-1).reshape(-1, BLOCK, bits)
        codes = np.packbits(np.pad(digits, ((0, 0), (0, 0), (8 - bits, 0))), axis=-1)[..., 0]
    low, step = (parts[name].astype(np.float32)[:, None] for name in ("low", "step"))
    return (low + step * codes).ravel()[: math.prod(shape)].reshape(shape)


def pack(source: Path, target: Path, bits: int, vocabulary: int) -> Iterator[tuple[str, int, float]]:
    """Writes a safetensors file with its matrices quantized.

    Args:
        vocabulary: matrices with so many rows are embedding and head and get 8 bits.

    Yields:
        Name, size and relative error of each matrix.
    """
    tensors, packed = {}, {}
    with safe_open(source, "numpy") as file:
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            tensor = file.get_tensor(name)
            if tensor.ndim != 2 or tensor.dtype.name not in FLOATS:
                tensors[name] = tensor
                continue
            width = 8 if tensor.shape[0] == vocabulary else bits
            parts = quantize(tensor, width)
            packed[name] = {"bits": width, "shape": tensor.shape, "dtype": tensor.dtype.name}
            tensors |= {f"{name}/{part}": value for part, value in parts.items()}
            yield name, tensor.size, _error(tensor, dequantize(parts, width, tensor.shape))
    save_file(tensors, target, metadata={"packed": json.dumps(packed)})


def _error(weights: np.ndarray, restored: np.ndarray) -> float:
    """Returns the root mean square of the difference of two arrays, divided by that of the first."""
    weights = np.asarray(weights, np.float32)
    return float(np.linalg.norm(restored - weights) / max(np.linalg.norm(weights), 1e-30))


def unpack(source: Path, target: Path) -> None:
    """Writes the safetensors file whose packed form `pack` wrote."""
    tensors = {}
    with safe_open(source, "numpy") as file:
        packed = json.loads(file.metadata()["packed"])
        parts = {f"{name}/{part}" for name in packed for part in ("codes", "low", "step")}
        for name in set(file.keys()) - parts:
            tensors[name] = file.get_tensor(name)
        for name, facts in packed.items():
            values = {part: file.get_tensor(f"{name}/{part}") for part in ("codes", "low", "step")}
            tensors[name] = dequantize(values, facts["bits"], tuple(facts["shape"])).astype(facts["dtype"])
    save_file(tensors, target, metadata={"format": "pt"})


def split(model: Path, out: Path, bits: int, piece_bytes: int) -> dict[str, Any]:
    """Writes the pieces of a checkpoint and their manifest into `out`; returns the numbers of the last line."""
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"--pieces {out}: is not empty; give a new folder")
    hidden = lambda path: path.name.startswith(".") or path.suffix in OTHER_WEIGHTS
    files = sorted(path for path in model.iterdir() if path.is_file() and not hidden(path))
    if not any(path.suffix == ".safetensors" for path in files):
        raise SystemExit(f"--model {model}: has no *.safetensors; give the folder of a Hugging Face checkpoint")
    vocabulary = json.loads((model / "config.json").read_text(encoding="utf-8")).get("vocab_size", 0)
    out.mkdir(parents=True, exist_ok=True)
    writer, errors, rows = PieceWriter(out, piece_bytes), [], []
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for path in files:
            packed = path.suffix == ".safetensors" and bits < 16
            if packed:
                target = Path(folder) / path.name
                errors += pack(path, target, bits, vocabulary)
            rows.append({"name": path.name, "packed": packed, **writer.add(target if packed else path)})
    pieces = writer.close()
    manifest = json.dumps({"bits": bits, "files": rows, "pieces": pieces}, indent=1)
    (out / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    weights = sum(size for _, size, _ in errors)
    result = {"pieces": len(pieces), "mib": round(sum(piece["bytes"] for piece in pieces) / 2**20, 1)}
    result["error"] = round(sum(size * error for _, size, error in errors) / max(weights, 1), 5)
    return result | {"largest_error": round(max((error for *_, error in errors), default=0.0), 5)}


class PieceWriter:
    """Writes a stream of files as pieces of a given size into a folder."""

    def __init__(self, out: Path, piece_bytes: int):
        self._out = out
        self._piece_bytes = piece_bytes
        self._pending = bytearray()
        self._pieces: list[dict[str, Any]] = []

    def add(self, path: Path) -> dict[str, Any]:
        """Appends a file to the stream; returns its size in bytes and its SHA-256."""
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as file:
            while data := file.read(self._piece_bytes - len(self._pending)):
                digest.update(data)
                size += len(data)
                self._pending += data
                if len(self._pending) == self._piece_bytes:
                    self._write()
        return {"bytes": size, "sha256": digest.hexdigest()}

    def close(self) -> list[dict[str, Any]]:
        """Writes what is left; returns name, size and SHA-256 of every piece in their order."""
        if self._pending:
            self._write()
        return self._pieces

    def _write(self) -> None:
        name = f"piece_{len(self._pieces):03d}.bin"
        (self._out / name).write_bytes(self._pending)
        sha256 = hashlib.sha256(self._pending).hexdigest()
        self._pieces.append({"name": name, "bytes": len(self._pending), "sha256": sha256})
        self._pending.clear()


def join(folder: Path, model: Path) -> dict[str, Any]:
    """Writes the checkpoint whose pieces are in `folder`; returns the numbers of the last line."""
    if model.exists():
        raise SystemExit(f"--model {model}: exists; give a new folder")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"--pieces {folder}: has no {MANIFEST}; bring it with the pieces") from None
    wrong = [problem for piece in manifest["pieces"] if (problem := _problem(folder, piece))]
    if wrong:
        raise SystemExit(f"--pieces {folder}: {', '.join(wrong)}; bring them again")
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model.parent) as temporary:
        made, stream = Path(temporary) / "model", _blocks(folder, manifest["pieces"])
        made.mkdir()
        rest = b""
        for row in manifest["files"]:
            carried = Path(temporary) / "carried"
            rest = _take(carried, row, stream, rest)
            if row["packed"]:
                unpack(carried, made / row["name"])
            else:
                shutil.move(carried, made / row["name"])
        made.rename(model)
    return {"files": len(manifest["files"]), "bits": manifest["bits"]}


def _problem(folder: Path, piece: dict[str, Any]) -> str:
    """Returns what is wrong with a piece, "" where nothing is."""
    path = folder / piece["name"]
    if not path.is_file():
        return f"{piece['name']} is missing"
    data = path.read_bytes()
    right = len(data) == piece["bytes"] and hashlib.sha256(data).hexdigest() == piece["sha256"]
    return "" if right else f"{piece['name']} is damaged"


def _blocks(folder: Path, pieces: list[dict[str, Any]]) -> Iterator[bytes]:
    """Yields the contents of the pieces in their order."""
    for piece in pieces:
        yield (folder / piece["name"]).read_bytes()


def _take(target: Path, row: dict[str, Any], stream: Iterator[bytes], rest: bytes) -> bytes:
    """Writes the next file of the stream to `target`; returns what follows it of the last piece that was read."""
    digest, left = hashlib.sha256(), row["bytes"]
    with open(target, "wb") as file:
        while left:
            rest = rest or next(stream)
            data, rest = rest[:left], rest[left:]
            digest.update(data)
            left -= file.write(data)
    if digest.hexdigest() != row["sha256"]:
        raise SystemExit(f"{row['name']}: its SHA-256 differs from the manifest's; split the checkpoint again")
    return rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, meaning in (("split", "makes pieces of a checkpoint"), ("join", "makes a checkpoint of pieces")):
        command = commands.add_parser(name, help=meaning)
        command.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
        command.add_argument("--pieces", type=Path, required=True, help="folder of the pieces")
        if name == "split":
            command.add_argument(
                "--bits", type=int, choices=(4, 5, 6, 8, 16), default=16, help="bits of a matrix's weights"
            )
            command.add_argument("--mib", type=int, default=60, help="largest size of a piece")
    args = parser.parse_args()
    if args.command == "split":
        result = split(args.model, args.pieces, args.bits, args.mib * 2**20)
    else:
        result = join(args.pieces, args.model)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
