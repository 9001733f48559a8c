"""bert-base-uncased's vocabulary: what models that build on it read text by, and do not hold."""

from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer

# Enough of its ids to tell it from every other vocabulary.
BERT_IDS = {"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")


def read_vocabulary(
    path: Path, vocab_size: int, *, model: str, added: tuple[str, ...] = (), exact: bool = False
) -> Tokenizer | BertWordPieceTokenizer:
    """bert-base-uncased's tokenizer, without padding and truncation.

    Args:
        path: its vocab.txt or tokenizer.json, or a folder with one of the two.
        vocab_size: tokens that the checkpoint has embeddings for.
        model: what reads text by it, for the errors.
        added: special tokens that get the next ids, where the file does not hold them.
        exact: fewer tokens than the checkpoint has are refused too, not only more.
    Raises: ValueError naming the file that is missing, unreadable or another vocabulary.
    """
    if path.is_dir():
        files = [path / name for name in VOCABULARY_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(
                f"{path}: holds neither {' nor '.join(VOCABULARY_FILES)} of bert-base-uncased, "
                f"which {model} reads text by; name a folder that does"
            )
        path = files[0]
    elif path.suffix not in (".txt", ".json"):
        raise ValueError(
            f"{path}: wanted a vocab.txt or tokenizer.json of bert-base-uncased, or a folder with "
            f"one; {model}'s published architecture is known"
        )
    try:
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
        else:
            tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
    # The tokenizers library raises a bare Exception for a file it cannot read.
    except Exception as error:
        raise ValueError(f"{path}: not a BERT vocabulary ({error})") from error
    for token, wanted in BERT_IDS.items():
        got = tokenizer.token_to_id(token)
        if got != wanted:
            raise ValueError(
                f"{path}: {token!r} has id {got}, bert-base-uncased's {wanted} is what {model} "
                "goes by"
            )
    tokenizer.add_special_tokens(list(added))
    size = tokenizer.get_vocab_size()
    if size > vocab_size or (exact and size < vocab_size):
        with_added = f" with {' and '.join(added)}" if added else ""
        raise ValueError(f"{path}: {size} tokens{with_added}, the checkpoint has {vocab_size}")
    return tokenizer
