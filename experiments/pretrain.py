"""Pretrains a decoder on any corpus. By default, 6 layers on Python's own library, in 4 hours on 2 CPU cores.

  python experiments/pretrain.py --text='books/**/*.txt' --workdir=runs/books --layers=12 --width=768 --steps=20_000

The corpus is given by one or more of --text, --jsonl, --parquet and --tfds. Several corpora are mixed in equal parts,
or by --weights. --separator splits one long text file into documents.
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
    stop_words: remove the stop words of this language, such as en or zh. This makes a language model worse; it is for
      comparison only.
    init: start from the parameters of another run's workdir, a Hugging Face folder, an imported model or an id on the
      hub. Its tokenizer and its shape are used too, unless flags give others. Adapters are added to this model.
    model: use the architecture and the tokenizer of a run's workdir, a Hugging Face folder, an imported model or an id
      on the hub, and not its parameters. Flags of the shape or of the tokenizer cannot be given too.
    vocab: number of tokens of the tokenizer that is trained, and of the model; none for 8192, or that of --size.
    length: positions in a row; none for 512, or for the context of the model if that is shorter.
    architecture: kind of decoder; none for llama.
    layers: number of layers; none for 6.
    width: size of the residual stream; none for 384.
    heads: number of heads of attention; none for 6.
    mup_width: width at which --lr was tuned; muP transfers it to this model, see lm/models/mup.py. 0 for no transfer.
    mup_layers: number of layers at which --lr was tuned; 0 for no transfer over depth.
    spike_guard: skip a step whose loss or gradient norm is this many standard deviations above the mean of the last 128
      steps, such as 6; none for never.
    steps: number of training steps.
    batch: rows in a batch.
  """
  rules = clean.DEFAULT + ((clean.StopWords(stop_words),) if stop_words else ())
  shape_flags = shape.explicit_values() | regularisation.explicit_values()
  origin = named.decoder_to_train(model, init, shape_flags, vocabulary.explicit_values(), computation.dtype)
  if length is not None and length < 1:
    raise ValueError(f'--length={length} is not positive; leave it out, or give 1 or more')
  size, text = shape.resolve(DEFAULT), corpus.source()
  scale = mup_scale(mup_width, mup_layers, size, bool(origin and not shape_flags), optimizer.optimizer)
  update = optimizer.make(steps, min(100, steps // 10), mup.rates(size.width, size.layers, **scale) if scale else ())

  def build(base: load.BaseModel | None) -> train.Run:
    decoder = named.trunk(base.model) if base and not shape_flags else None
    vocab = vocabulary.vocab or (base.model.vocab if base else size.vocab)
    positions = length or min(512, decoder.max_length if decoder else 512)
    goal = prediction.make(positions)
    tokens = base and base.tokenizer or vocabulary.tokenizer(vocab, goal.control, kind='bpe')
    decoder = decoder or shape.decoder(DEFAULT, vocab, positions, computation, regularisation)
    decoder = computation.apply(mup.parametrised(decoder, **scale) if scale else decoder)
    network, goal = ahead.apply(decoder, prediction, goal)
    run = train.Run(
        model=network, objective=goal, data=dataset.Text(text, tokens, positions, rules), optimizer=update,
        steps=steps, batch=batch, augment=augmentations.make(), stages=warmup.stages(batch, positions),
        guard=None if spike_guard is None else guard.Guard(sigma=spike_guard))
    return lora.adapt(cadence.apply(computation.apply_to_steps(run)))
  return train.after_opening(build, base=origin)


def mup_scale(width: int, layers: int, size: Size, is_given: bool, optimizer: str) -> dict[str, int]:
  """Returns the sizes at which the learning rate was tuned, for a transfer by muP; none for no transfer.

  Raises ValueError where the decoder, whose shape may be given by another model, or the optimizer allows no transfer.
  """
  if not width and not layers:
    return {}
  if is_given or size.architecture != 'llama' or optimizer in ('sgd', 'muon', 'adafactor'):
    raise ValueError(f'--mup_width={width} and --mup_layers={layers} need the architecture llama, a shape from flags '
                     'and not from --model or --init, and an optimizer with the update of adam; this is '
                     f'{size.architecture} with {optimizer}')
  return {'base_width': width or size.width, 'base_layers': layers or size.layers}


if __name__ == '__main__':
  launch.run(experiment)
