"""Text to batches: tokenizers, Megatron's `.bin`/`.idx` files, GPT samples, blends. NumPy only.

`preprocess` (text files to `.bin`/`.idx`) is in the module of its name.
"""

from .batching import batches
from .blend import BlendedDataset, build_datasets
from .corpus import Corpus, open_text, prepare_stdlib, range_tokens, stdlib_texts, unigram_entropy
from .gpt_dataset import GPTDataset, split_ranges
from .indexed import IndexedDataset, IndexedWriter, merge, token_dtype, write_documents
from .tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

__all__ = [
    "BlendedDataset",
    "Corpus",
    "GPTDataset",
    "IndexedDataset",
    "IndexedWriter",
    "Tokenizer",
    "batches",
    "build_datasets",
    "byte_tokenizer",
    "load_tokenizer",
    "merge",
    "open_text",
    "prepare_stdlib",
    "range_tokens",
    "split_ranges",
    "stdlib_texts",
    "token_dtype",
    "train_bpe",
    "unigram_entropy",
    "write_documents",
]
