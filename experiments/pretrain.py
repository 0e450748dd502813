"""Pretrain a decoder on any corpus. By default: Python's own library, 6 layers, 4 hours on 2 CPU cores.

  python experiments/pretrain.py --text='books/**/*.txt' --workdir=runs/books --layers=12 --width=768 --steps=20_000

Name the corpus with one or more of --text, --jsonl, --parquet and --tfds; several are mixed in equal parts, or by
--weights. One long text file is cut into documents by --separator.
"""
import pathlib

from lm import launch, load, named, options, train
from lm.data import dataset
from lm.data.text import clean
from lm.models import mup
from lm.options import Size
from lm.train import guard

DEFAULT = Size('llama', layers=6, width=384, heads=6, vocab=8192)


def experiment(*, corpus: options.Corpus = options.Corpus(), stop_words: str | None = None,
               init: pathlib.Path | None = None, model: str | None = None,
               vocabulary: options.Vocabulary = options.Vocabulary(), length: int | None = None,
               shape: options.Shape = options.Shape(),
               regularisation: options.Regularisation = options.Regularisation(),
               augmentations: options.Augmentations = options.Augmentations(),
               prediction: options.Prediction = options.Prediction(), ahead: options.Ahead = options.Ahead(),
               optimizer: options.Optimizer = options.Optimizer(), mup_width: int = 0, mup_layers: int = 0,
               spike_guard: float | None = None, steps: int = 2000, batch: int = 16,
               warmup: options.Warmup = options.Warmup(), computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_every=250, save_every=500),
               lora: options.Lora = options.Lora()) -> train.Run | train.Pending:
  """Pretrains a decoder.

  Most runs set: text, jsonl, workdir, init, size, layers, width, heads, length, objective, optimizer, lr, steps, batch.

  Args:
    stop_words: drop the stop words of this language, such as en or zh; hurts a language model, for comparison only.
    init: start from the result of another run's workdir, from a Hugging Face folder, an imported one or an id on the
      hub; adapters lie on it. It gives the tokenizer, but where a flag of one is given, and the shape, but where a flag
      of shape is given.
    model: take architecture and tokenizer from a run's workdir, a Hugging Face or imported folder or an id on the hub,
      and not the parameters, which --init gives. Goes with no flag of shape or of a tokenizer.
    vocab: tokens of the tokenizer that is trained, and of the model; none for 8192, or those of --size.
    length: positions a row; by default 512, or what the model reads at once, if that is less.
    architecture: the first flag of shape; none for llama.
    layers: how many; none for 6.
    width: of the residual stream; none for 384.
    heads: of attention; none for 6.
    mup_width: width of the model that --lr was found with, of which this is a larger or smaller one, as in
      lm/models/mup.py; 0 for a model on its own.
    mup_layers: its number of layers; 0 for as many as here.
    spike_guard: skip a step whose loss or gradient norm is so many standard deviations above the last 128, such as 6.
    steps: of training.
    batch: rows a step.
  """
  rules = clean.DEFAULT + ((clean.StopWords(stop_words),) if stop_words else ())
  shape_flags = shape.explicit_values() | regularisation.explicit_values()
  origin = named.decoder_to_train(model, init, shape_flags, vocabulary.explicit_values(), computation.dtype)
  if length is not None and length < 1:
    raise ValueError(f'--length={length} is not positive; leave it out, or give it 1 at least')
  size, text = shape.resolve(DEFAULT), corpus.source()
  scaled = bool(mup_width or mup_layers)
  if scaled and (origin and not shape_flags or size.architecture != 'llama'
                 or optimizer.optimizer in ('sgd', 'muon', 'adafactor')):
    raise ValueError(f'--mup_width={mup_width} and --mup_layers={mup_layers} are for the architecture llama, its shape '
                     'given by flags, not by --model or --init, and an optimizer that steps as adamw does; not for '
                     f'{size.architecture} with {optimizer.optimizer}')
  scale = {'base_width': mup_width or size.width, 'base_layers': mup_layers or size.layers}
  update = optimizer.make(steps, min(100, steps // 10), mup.rates(size.width, size.layers, **scale) if scaled else ())

  def build(base: load.BaseModel | None) -> train.Run:
    decoder = named.trunk(base.model) if base and not shape_flags else None
    vocab = vocabulary.vocab or (base.model.vocab if base else size.vocab)
    positions = length or min(512, decoder.max_length if decoder else 512)
    goal = prediction.make(positions)
    tokens = base.tokenizer if base else None
    tokens = tokens or vocabulary.tokenizer(vocab, goal.control, kind='bpe')
    decoder = decoder or shape.decoder(DEFAULT, vocab, positions, computation, regularisation)
    decoder = computation.apply(mup.parametrised(decoder, **scale) if scaled else decoder)
    network, goal = ahead.apply(decoder, prediction, goal)
    run = train.Run(
        model=network, objective=goal, data=dataset.Text(text, tokens, positions, rules), optimizer=update,
        steps=steps, batch=batch, augment=augmentations.make(), stages=warmup.stages(batch, positions),
        guard=None if spike_guard is None else guard.Guard(sigma=spike_guard))
    return lora.adapt(cadence.apply(computation.with_accumulation(run)))
  return train.after_opening(build, base=origin)


if __name__ == '__main__':
  launch.run(experiment)
