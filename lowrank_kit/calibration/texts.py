"""What calibration is fed: unpadded token sequences, batched by length."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from jaxtyping import Bool

from lowrank_kit.data.padding import NOT_PREDICTED as NOT_PREDICTED
from lowrank_kit.data.padding import pad_right
from lowrank_kit.deferred import Tensor, torch
from lowrank_kit.errors import LowRankKitError


@dataclass(frozen=True)
class CalibrationSamples:
    """Token sequences without padding.

    Every sample maps the model's input names (``input_ids``, and where the tokenizer gives them
    ``token_type_ids``, ``decoder_input_ids``) to one-dimensional integer tensors of its own length. Its ``labels``, if
    any, are such a tensor (-100 where no token is to be predicted), or a class or a score without dimensions.
    The model reads the first ``opening`` tokens of a sample (BOS), and nothing is measured at them. ``batch_size``
    sequences at most are read at a time (`lowrank_kit.calibration.batches.batches_of`).
    """

    sequences: tuple[dict[str, Tensor], ...]
    opening: int = 0
    batch_size: int = 8

    @classmethod
    def from_padded(cls, batches: Iterable[Mapping[str, Tensor]]) -> "CalibrationSamples":
        """Take padded batches apart, on whichever side they are padded.

        Each batch holds ``[rows, tokens]`` tensors. ``attention_mask`` tells the real tokens of every input but
        those named ``decoder_*``, for which ``decoder_attention_mask`` does; without a mask all are real.
        """
        sequences = []
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if not k.endswith("attention_mask")}
            for row in range(len(next(iter(inputs.values())))):
                sample = {}
                for name, values in inputs.items():
                    prefix = "decoder_" if name.startswith("decoder_") else ""
                    mask = batch.get(f"{prefix}attention_mask")
                    sample[name] = values[row] if mask is None else values[row][mask[row].bool()]
                if len(sample["input_ids"]):
                    sequences.append(sample)
        if not sequences:
            raise LowRankKitError(
                "the calibration set is empty: no sample has a single real token; raise calibration.samples "
                "or choose a task with training rows"
            )
        return cls(tuple(sequences))

    @property
    def tokens(self) -> int:
        """Number of real (encoder or decoder-only) tokens that are measured at."""
        return sum(max(0, len(sample["input_ids"]) - self.opening) for sample in self.sequences)

    def first(self, count: int) -> "CalibrationSamples":
        """The first so many samples."""
        return replace(self, sequences=self.sequences[:count])

    def with_decoder_inputs(self, start_token_id: int) -> "CalibrationSamples":
        """Give samples without ``decoder_input_ids`` their own input, shifted right behind the start token."""

        def shifted(sample: dict[str, Tensor]) -> dict[str, Tensor]:
            start = sample["input_ids"].new_tensor([start_token_id])
            return {"decoder_input_ids": torch.cat([start, sample["input_ids"][:-1]]), **sample}

        return replace(self, sequences=tuple(shifted(sample) for sample in self.sequences))

    def without_labels(self) -> "CalibrationSamples":
        """Leave out what only a loss reads."""
        return replace(
            self,
            sequences=tuple({n: values for n, values in sample.items() if n != "labels"} for sample in self.sequences),
        )

    def fingerprint(self) -> str:
        """Content hash: equal exactly when the tokens that a model reads, their order and ``opening`` are equal."""
        digest = hashlib.sha256(f"{self.opening} before each;".encode() if self.opening else b"")
        for sample in self.sequences:
            digest.update(f"{len(sample)} inputs;".encode())
            for name in sorted(sample):
                values = sample[name]
                digest.update(f"{name}:{tuple(values.shape)};".encode())
                # Whole numbers as such, whatever their width; scores as they are.
                exact = values.double() if values.is_floating_point() else values.to(torch.int64)
                digest.update(exact.numpy().tobytes())
        return digest.hexdigest()

    def batches(self, size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
        """Right-padded batches with attention masks, longest samples first so that little padding is run.

        Right padding gives every family, absolute positions included, the positions it was trained with.
        """
        ordered = sorted(self.sequences, key=lambda s: len(s["input_ids"]), reverse=True)
        return [pad_right(ordered[i : i + size], pad_token_id) for i in range(0, len(ordered), size)]


def measured(mask: Tensor, opening: int) -> Bool[Tensor, "rows tokens"]:
    """The positions of a right-padded batch at which something is measured: real tokens behind the opening."""
    return mask.bool() & (torch.arange(mask.shape[1], device=mask.device) >= opening)
