"""Token data: files and shards, the order of windows, prefetching, preparing. Knows nothing of models."""

from protomamba.data.corpus import default_corpus
from protomamba.data.prefetch import Prefetcher
from protomamba.data.shards import ShardSet, in_memory, infer_vocab, open_token_dir, open_token_file
from protomamba.data.token_stream import TokenStream
from protomamba.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from protomamba.data.windows import Batch, Cursor, batch_from_tokens, eval_batches

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Cursor",
    "Prefetcher",
    "ShardSet",
    "TokenStream",
    "Tokenizer",
    "batch_from_tokens",
    "default_corpus",
    "eval_batches",
    "in_memory",
    "infer_vocab",
    "load_tokenizer",
    "open_token_dir",
    "open_token_file",
    "tokenizer_from_json",
]
