"""How KV blocks lie in memory. Needs no torch: supervisors and schedulers read it too."""

from typing import Literal, TypeAlias

import msgspec

from slipstream.types import BLOCK_TOKENS

KvDtype: TypeAlias = Literal["float32", "bfloat16", "float8_e4m3fn"]

ELEMENT_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


class KvLayout(msgspec.Struct, frozen=True):
    """Pool `[blocks, layers, 2, kv_heads, BLOCK_TOKENS, head_dim]`, contiguous; 2: key, value.

    A block holds all layers of its tokens in one contiguous byte range: one descriptor for
    transfer, digest and offload.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KvDtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, BLOCK_TOKENS, self.head_dim)

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * 2 * self.num_kv_heads * BLOCK_TOKENS * self.head_dim
        return elements * ELEMENT_BYTES[self.dtype]

    def layout_id(
        self,
        model_fingerprint: str,
        quantization: str = "none",
        ranks: int = 1,
        computed_in: str = "",
    ) -> str:
        """Equal on two workers exactly if a block's bytes mean the same on both.

        Names the model, the dtype, the layout, and what the weights were made into, for keys and
        values come out of them: `1f0c6e2d9a7b4c55/bfloat16/l30.h3.t16.d64`, with `/int8` behind it,
        and `/tp2` where a block is one of two ranks' part of it. `computed_in`: the dtype of
        activations, where blocks have another.
        """
        shape = f"l{self.num_layers}.h{self.num_kv_heads}.t{BLOCK_TOKENS}.d{self.head_dim}"
        plain = f"{model_fingerprint[:16]}/{self.dtype}/{shape}"
        if computed_in not in ("", self.dtype):
            plain += f"/{computed_in}"
        made = plain if quantization == "none" else f"{plain}/{quantization}"
        return made if ranks == 1 else f"{made}/tp{ranks}"
