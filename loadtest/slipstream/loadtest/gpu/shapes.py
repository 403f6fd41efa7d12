"""Models as shapes: what a step of one computes and reads, and a folder to serve it from."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ELEMENT_BYTES = 2
"""bfloat16"""
END = "<|end|>"


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Parameters of matrices that every token goes through, the vocabulary's left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    @property
    def kv_token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * ELEMENT_BYTES

    def decode_bytes(self, rows: int, context: int) -> int:
        """The fewest that a step of so many streams reads: each weight once, each context."""
        weights = (self.layer_weights + self.head_weights) * ELEMENT_BYTES
        return weights + rows * context * self.kv_token_bytes

    def prompt_operations(self, tokens: int) -> int:
        """Two for each multiplication: matrices, one row of the vocabulary's, causal attention."""
        attention = 2 * self.layers * self.heads * self.head_dim * tokens**2
        return 2 * (self.layer_weights * tokens + self.head_weights) + attention

    def write(self, folder: Path, max_position_embeddings: int = 40_960) -> None:
        """What serving it with dummy weights needs: config.json and a tokenizer of bytes, which has
        a text for every id, so that each token is streamed."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "eos_token_id": self.vocab - 1,
            "torch_dtype": "bfloat16",
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        self._tokenizer().save(str(folder / "tokenizer.json"))
        words = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(words))

    def _tokenizer(self) -> Tokenizer:
        words = map("".join, itertools.product(ascii_letters, repeat=3))
        texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words][: self.vocab - 1]
        tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        return tokenizer


EIGHT_B = Shape("8B", 4096, 14_336, 32, 32, 8, 128, 128_256)
THIRTY_TWO_B = Shape("32B", 5120, 25_600, 64, 64, 8, 128, 128_256)
