"""Scores text under a trained run or a Hugging Face model: log-probabilities, loss, perplexity, bits per byte.

  python experiments/score.py --model=gpt2 --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --text="Once upon a time"
  python experiments/score.py --workdir=runs/quickstart --split=validation
  python experiments/score.py --model=gpt2 --jsonl='texts/*.jsonl'
  python experiments/score.py --model=google-bert/bert-base-uncased --text="Once upon a time"
  python experiments/score.py --workdir=runs/reward --source="Reverse abcd" --text="dcba"
  python experiments/score.py --workdir=runs/reward --pairs='pairs/*.jsonl'
  python experiments/score.py --model=t5-small --source="translate English to German: Hello" --text="Hallo"
"""
import dataclasses
import functools
import pathlib
from typing import Literal

import jax

from lm import launch, load, sharding
from lm.data.text import compressed, corpora
from lm.evaluate import rewards, text_scores
from lm.hf import pretrained
from lm.models.quantized_decoder import check_weights, float_weights
from lm.models.reward import Reward


def score(*, workdir: pathlib.Path | None = None, model: str | None = None, text: str | None = None,
          file: pathlib.Path | None = None, jsonl: str | None = None, key: str = 'text', source: str | None = None,
          source_key: str | None = None, split: str | None = None, pairs: str | None = None, context: int = 0,
          bos: bool | None = None, windows: bool = False, best: bool = False, mesh: str | None = None,
          encoding_errors: Literal['strict', 'replace', 'drop'] = 'strict', decompressed_limit: float = 64.,
          allow_left_out: bool = False, weights: Literal['float32', 'int8', 'int4'] = 'float32') -> None:
  """Scores the tokens of a text, many texts, or a split of a run's data.

  An encoder-decoder scores a text given its source, including the end of the text. The scores of an encoder are
  pseudo-log-likelihoods. A reward model prints the reward of a text, as the answer to --source if given.

  Args:
    workdir: workdir of the run; none for runs/quickstart.
    model: a Hugging Face folder, an imported model, an id on the hub or the workdir of a run, in place of --workdir.
    text: text to score.
    file: text file to score.
    jsonl: files of JSON lines, also .gz and .zst, as a glob pattern; each line is a text to score.
    key: field of a line that holds the text.
    source: input of the encoder of an encoder-decoder, such as a text to translate, whose translation is scored; for a
      reward model, the prompt.
    source_key: field of a line that holds the source.
    split: split of the run's data to score, train or validation.
    pairs: files of JSON lines with a prompt, a chosen and a rejected answer, which a reward model compares.
    context: number of positions before each window of a split that are read as context and not scored.
    bos: begin the text with the token bos, or not (--nobos), in which case its first token is not scored; none does as
      the tokenizer of the model, or as the documents of the run.
    windows: score a text longer than the model's context in windows that overlap by half.
    encoding_errors: treatment of a line that is not valid UTF-8. strict raises an error, replace repairs the line, drop
      leaves it out.
    decompressed_limit: largest size in GiB of a file after decompression.
    allow_left_out: continue even if half of the pairs are left out because they are too long, or half of the lines
      because they are empty.
    weights: int8 or int4 rounds the matrices of a decoder, as for generation, so that the loss shows what that costs.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
    best: use the best checkpoint by the metric of the run, mostly the validation loss, instead of the newest.
  """
  workdir, model = load.run_or_model(workdir, model, best)
  check_flags(model, text, file, jsonl, split, pairs, source, source_key, allow_left_out)
  compressed.check_limit(decompressed_limit)
  read_json = lambda pattern, key: corpora.jsonl(pattern, key, 0., encoding_errors, decompressed_limit).splits['train']
  if jsonl is None:
    texts, sources = one_text(text, file, source)
  else:
    texts, sources = read_json(jsonl, key), read_json(jsonl, source_key) if source_key else None
    texts = texts if sources else text_scores.without_empty(texts, key, allow_left_out)
  if model:   # before the weights are read, which takes long
    text_scores.check_flags(pretrained.open_model(pretrained.locate(model)), sources is not None, bos)
  with jax.set_mesh(devices := sharding.make_mesh(mesh)):
    loaded = open_model(workdir, model, best, weights)
    if split is not None:
      text_scores.show_split(loaded, split, context, devices)
    elif isinstance(loaded.model, Reward):
      records = None if pairs is None else read_json(pairs, None)
      rewards.show_rewards(loaded, loaded.run.data.template, records, texts, sources, bos, allow_left_out)
    else:
      check_model(loaded, model or workdir, pairs is not None, sources is not None, bos)
      if loaded.model.causal and not windows:
        text_scores.check_lengths(loaded, texts)
      show = text_scores.show if jsonl is None else text_scores.show_all
      show(loaded, texts, sources, text_scores.begins(loaded, bos))


def check_flags(model: str | None, text: str | None, file: pathlib.Path | None, jsonl: str | None, split: str | None,
                pairs: str | None, source: str | None, source_key: str | None, allow_left_out: bool) -> None:
  """Raises ValueError where flags contradict one another."""
  if sum(value is not None for value in (text, file, jsonl, split, pairs)) != 1:
    raise ValueError('give one of --text, --file, --jsonl, --split and --pairs')
  if allow_left_out and jsonl is None and pairs is None:
    raise ValueError('--allow_left_out is for --jsonl and --pairs; leave it out')
  if model and split is not None:
    raise ValueError('--split is for the data of a run; with --model, give --text, --file or --jsonl')
  if source is not None and text is None and file is None or source_key and jsonl is None:
    raise ValueError('--source goes with --text or --file, --source_key with --jsonl')


def one_text(text: str | None, file: pathlib.Path | None, source: str | None) -> tuple[list, list | None]:
  """Returns the texts and the sources of `--text` or `--file`. Raises ValueError where there is nothing to score."""
  if file is not None:
    text = text_scores.read_text(file)
  if text == '' and source is None:   # with a source, the end of an empty text is scored
    raise ValueError('the text is empty, so there is nothing to score; give a text')
  return [text], None if source is None else [source]


def open_model(workdir: pathlib.Path, model: str | None, best: bool, weights: Literal['float32', 'int8', 'int4']
               ) -> load.TrainedModel | pretrained.Pretrained:
  """Reads the model of a run, or the one that is named; with `weights` of int8 or int4, its matrices are rounded."""
  check = functools.partial(check_weights, dtype=weights)
  loaded = pretrained.load(model, check=check) if model else load.open_trained(workdir, best, check)
  if weights == 'float32':
    return loaded
  return dataclasses.replace(loaded, params=float_weights(loaded.model, loaded.params, weights))


def check_model(loaded: load.TrainedModel | pretrained.Pretrained, name: pathlib.Path | str, has_pairs: bool,
                has_sources: bool, bos: bool | None) -> None:
  """Raises ValueError where a model, which is no reward model, cannot score texts as the flags say."""
  if has_pairs:
    raise ValueError(f'--pairs is for reward models, and {name} is not one; train one with '
                     '"experiments/preference.py --method=reward"')
  if isinstance(loaded, pretrained.Pretrained):   # whose flags were checked before
    return
  text_scores.check_flags(loaded.model, has_sources, bos)
  if loaded.run.objective.prompt is None and loaded.model.causal:
    raise ValueError(f'the decoder in {name} was trained to fill in masked tokens, not to predict the next token; '
                     '--split gives the loss of its objective')


if __name__ == '__main__':
  launch.tool(score)
