"""Scores and texts of encoders and encoder-decoders equal those of transformers and computations by hand."""
import json

import generate as generate_script
import jax
import jax.numpy as jnp
import numpy as np
import pretrain
import pytest
import score
from helpers.slow import slow

from lm import evaluate, generate, sharding, signature
from lm.data import tokenizers
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import score as scoring
from lm.evaluate import text_scores
from lm.generate import completion
from lm.hf import pretrained
from lm.models import encoder, encoder_decoder, transformer

TOKENIZER = Bytes(('<pad>', '[MASK]'))
BOS, EOS, PAD, MASK = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.control_id('<pad>'), TOKENIZER.control_id('[MASK]')
V = TOKENIZER.vocab_size
SOURCES = ['translate: good morning', 'a', 'something longer, which is read as a whole', 'né']
TARGETS = ['guten Morgen', 'ein ganzer Satz, der länger als seine Quelle ist', 'b', '']
MODELS = {'bert': encoder.bert(V, 16, 2, 2, 48), 't5': encoder_decoder.t5(V, 16, 2, 2, 8, 24, gated=True, tied=False),
          'gpt2': transformer.gpt2(V, 16, 2, 2, 64)}


def random_params(model):
  """Returns random weights with which greedy text varies."""
  rng = np.random.default_rng(0)
  return jax.tree.map_with_path(lambda path, x: rng.normal(path[-1].key.endswith('scale'), 0.3, x.shape).astype('f4'),
                                jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(autouse=True)
def mesh():
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    yield


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Returns one folder for each kind of model, as other programs write it. The tokenizer of T5 has no bos."""
  root = tmp_path_factory.mktemp('models')
  for name, model in MODELS.items():
    pretrained.write(root / name, model, random_params(model), TOKENIZER)
    if name == 't5':
      config = json.loads((root / name / 'config.json').read_text()) | {
          'bos_token_id': None, 'decoder_start_token_id': PAD, 'pad_token_id': PAD}
      (root / name / 'config.json').write_text(json.dumps(config))
      (root / name / 'generation_config.json').write_text(json.dumps(
          {key: config[key] for key in ('decoder_start_token_id', 'pad_token_id', 'eos_token_id')}))
  return root


def encoded(texts):
  return [np.int32([*TOKENIZER.encode(text), EOS]) for text in texts]


# Encoder-decoders.


def test_scores_of_pairs_are_the_loss_of_transformers(folders, transformers):
  import torch
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(folders / 't5').eval()
  loaded = pretrained.load(str(folders / 't5'))
  assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (PAD, EOS)
  scores = text_scores.scored(loaded, TARGETS, SOURCES, True)
  for source, target, each in zip(encoded(SOURCES), encoded(TARGETS), scores, strict=True):
    assert each.tokens == target.tolist()   # with the end
    with torch.inference_mode():
      loss = theirs(input_ids=torch.tensor(source[None]).long(), labels=torch.tensor(target[None]).long()).loss.item()
    assert np.mean(each.scores) == pytest.approx(-loss, abs=1e-5) and loss > 1
  assert [each.size for each in scores] == [len(text.encode()) for text in TARGETS]


@pytest.fixture(scope='module')
def pairs():
  """(parameters, sources, texts, scores by the logits of each pair alone)"""
  model, rng = MODELS['t5'], np.random.default_rng(0)
  lengths = [(3, 60), (90, 2), (3, 1), (40, 40), (3, 12), (200, 9), (40, 5), (90, 20)]
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    # Initial weights, whose scores round less than those of larger ones.
    params = jax.jit(model.init)(jax.random.key(0))
    alone = jax.jit(lambda params, batch: jax.nn.log_softmax((out := model.apply(params, batch)).head(out.hidden)))
    sources, texts = ([rng.integers(V, size=n) for n in side] for side in zip(*lengths))
    scores = []
    for source, text in zip(sources, texts):
      padded = np.pad(text, (0, 60 - len(text)))[None]   # one shape; causal, so padding has no effect
      logits = np.asarray(alone(params, Batch(padded, source=source[None])))
      scores.append(logits[0, np.arange(len(text) - 1), text[1:]])
  return jax.tree.map(np.asarray, params), sources, texts, scores


@pytest.mark.parametrize('mesh_shape', ['fsdp:1', *slow('fsdp:4,tensor:2')])
def test_a_pair_scores_in_a_batch_as_alone_with_few_shapes(pairs, mesh_shape):
  params, sources, texts, expected = pairs
  before = scoring.predict._cache_size()
  with jax.set_mesh(sharding.make_mesh(mesh_shape, jax.devices()[:8 if mesh_shape == 'fsdp:4,tensor:2' else 1])):
    scores = evaluate.log_probabilities(MODELS['t5'], jax.tree.map(jnp.asarray, params), texts, sources)
  # (64, 32), (32, 96), (48, 48), (32, 32), (32, 256) and (32, 48) columns of texts and sources.
  assert scoring.predict._cache_size() - before == 6
  for a, b in zip(scores, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_greedy_text_is_that_of_transformers(folders, transformers):
  import torch
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(folders / 't5').eval()
  loaded, sources = pretrained.load(str(folders / 't5')), encoded(SOURCES)
  ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids).long() for ids in sources], True, PAD)
  mask = torch.arange(ids.shape[1])[None] < torch.tensor(list(map(len, sources)))[:, None]
  generated = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=20, do_sample=False).numpy()[:, 1:]
  texts = [TOKENIZER.encode(text) for text in SOURCES]
  request = completion.Completion(loaded.model, loaded.params, loaded.tokenizer, generate.Sampling(0.), 20, 0)
  pieces = completion.complete(request, texts, completion.prompt_batch(loaded.model, texts, loaded.tokenizer))
  ours = [np.concatenate(row) for row in zip(*pieces)]
  for a, b in zip(ours, generated, strict=True):
    end = [*b.tolist(), EOS].index(EOS)
    np.testing.assert_array_equal(a[:end], b[:end])
    assert len(set(b[:end].tolist())) > 2   # otherwise the test shows little
  assert len({row.tobytes() for row in ours}) == len(SOURCES)


@pytest.mark.slow
def test_the_text_of_an_encoder_decoder_depends_on_its_source_and_not_on_its_batch(folders):
  loaded = pretrained.load(str(folders / 't5'))
  write = lambda prompts: generate.generate(loaded.model, loaded.params, loaded.tokenizer, prompts,
                                            generate.Sampling(0.9, repetition_penalty=1.1), max_tokens=12, seed=3)
  together = write(SOURCES)
  assert [write([source])[0] for source in SOURCES[1:]] == together[1:] and len(set(together)) == len(SOURCES)


@pytest.mark.slow
def test_the_first_token_of_a_decoder_is_at_the_start_of_its_text():
  """SentencePiece drops the space of a token at the start of a text, and only there."""
  class Words(Bytes):
    encode_batch = lambda self, texts: [np.int32([3]) for _ in texts]
    decode = lambda self, ids: ''.join(f' {i}' for i in ids).removeprefix(' ')

  model = MODELS['t5']
  text, = generate.generate(model, random_params(model), Words(TOKENIZER.control), ['x'], generate.Sampling(0.),
                            max_tokens=3)
  assert text and text[0] != ' '


def test_an_exported_config_names_the_token_that_the_decoder_starts_with(tmp_path, transformers):
  import torch
  model, params = MODELS['t5'], random_params(MODELS['t5'])
  pretrained.write(tmp_path / 'out', model, params, TOKENIZER)
  assert pretrained.load(str(tmp_path / 'out')).tokenizer.bos_id == BOS
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'out')
  with torch.inference_mode():
    loss = theirs.eval()(input_ids=torch.tensor([[5, 6, EOS]]), labels=torch.tensor([[7, 8, EOS]])).loss.item()
  scores, = evaluate.log_probabilities(model, params, [np.int32([BOS, 7, 8, EOS])], sources=[np.int32([5, 6, EOS])])
  assert np.mean(scores) == pytest.approx(-loss, abs=1e-5)


# Encoders.


def test_pseudo_log_probabilities_are_those_of_masking_by_hand(folders, transformers):
  import torch
  theirs = transformers.BertForMaskedLM.from_pretrained(folders / 'bert').eval()
  loaded, texts = pretrained.load(str(folders / 'bert')), ['a', 'some words', 'as long as may be, ' * 2, '']
  scores = text_scores.scored(loaded, texts, None, True)
  for text, each in zip(texts, scores, strict=True):
    ids = torch.tensor([BOS, *TOKENIZER.encode(text), EOS])
    assert each.tokens == ids[1:-1].tolist() and each.size == len(text)
    for i, value in enumerate(each.scores, 1):
      masked = torch.where(torch.arange(len(ids)) == i, MASK, ids)
      with torch.inference_mode():
        expected = theirs(masked[None]).logits[0, i].log_softmax(-1)[ids[i]].item()
      assert value == pytest.approx(expected, abs=2e-5) and expected < -0.1


@pytest.mark.slow
@pytest.mark.parametrize('mesh_shape', ['fsdp:1', 'fsdp:4,tensor:2'])
def test_a_text_has_the_same_pseudo_log_probabilities_in_a_batch_as_alone(mesh_shape):
  model, rng = MODELS['bert'], np.random.default_rng(0)
  params, texts = random_params(model), [rng.integers(V, size=n) for n in (3, 48, 2, 17, 0, 5, 30)]
  alone = [evaluate.pseudo_log_probabilities(model, params, [text], MASK)[0] for text in texts]
  with jax.set_mesh(sharding.make_mesh(mesh_shape, jax.devices()[:8 if mesh_shape == 'fsdp:4,tensor:2' else 1])):
    scores = evaluate.pseudo_log_probabilities(model, jax.tree.map(jnp.asarray, params), texts, MASK)
  for a, b, text in zip(scores, alone, texts, strict=True):
    assert len(a) == max(len(text) - 2, 0)
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_no_score_sees_its_own_token():
  """The pseudo-probabilities of all tokens in one place of a text add up to one."""
  model, text = MODELS['bert'], np.arange(10)
  params = random_params(model)
  both = [evaluate.pseudo_log_probabilities(model, params, [np.where(text == 4, token, text) for token in tokens], MASK)
          for tokens in ([range(0, V, 2), range(1, V, 2)][i] for i in (0, 1))]
  mass = sum(np.exp(scores[3], dtype=np.float64) for half in both for scores in half)
  assert mass == pytest.approx(1, abs=1e-4)   # the probabilities of the whole vocabulary add up to one


# Commands.


def test_two_flags_that_each_name_a_model_are_refused(tmp_path):
  for script in (score.score, generate_script.main):
    with pytest.raises(ValueError, match='--workdir=.* and --model=gpt2 both name a model; give one of them'):
      script(workdir=tmp_path, model='gpt2', **({'text': 'a'} if script is score.score else {'prompt': 'a'}))


@pytest.mark.slow
def test_the_commands_print_what_they_computed(folders, capsys, tmp_path):
  score.score(model=str(folders / 'bert'), text='some text')
  out = capsys.readouterr().out
  assert out.startswith('pseudo-log-likelihood: ') and '9 tokens, 9 bytes' in out
  score.score(model=str(folders / 't5'), source='some text', text='other')
  out = capsys.readouterr().out
  assert "'</s>'" in out and '6 tokens, 5 bytes' in out
  loss = out.split('loss ')[1].split()[0]
  (tmp_path / 'pairs.jsonl').write_text(''.join(json.dumps({'de': de, 'en': en}) + '\n' for en, de in (
      ('some text', 'other'), *zip(SOURCES, TARGETS))))
  score.score(model=str(folders / 't5'), jsonl=str(tmp_path / '*.jsonl'), key='de', source_key='en')
  out = capsys.readouterr().out
  assert f"6  {loss}" in out.splitlines()[1] and '5 texts: ' in out
  signature.call(generate_script.main, model=str(folders / 't5'), prompt='some text', temperature=0., max_tokens=9)
  assert not capsys.readouterr().out.startswith('some text')


@pytest.mark.parametrize('kind,message,flags', [
    ('t5', 'give --source', {'text': 'a'}), ('gpt2', 'for an encoder-decoder', {'text': 'a', 'source': 'b'}),
    ('t5', '--nobos is for decoders', {'text': 'a', 'source': 'b', 'bos': False}),
    ('bert', '--nobos', {'text': 'a', 'bos': False}), ('bert', 'for an encoder-decoder', {'text': 'a', 'source': 'b'}),
    ('bert', '62 tokens, with the two around it, is more than the 48', {'text': 'x' * 60}),
    ('gpt2', 'text 1 of 1 has 65 tokens, and the model reads 64 at once', {'text': 'x' * 65}),
    ('t5', '--source_key with --jsonl', {'text': 'a', 'source_key': 'b'}),
    ('t5', '--source goes with --text', {'jsonl': 'a', 'source': 'b'})])
def test_flags_that_do_not_go_with_the_model_are_refused(folders, kind, message, flags):
  with pytest.raises(ValueError, match=message):
    score.score(model=str(folders / kind), **flags)


def test_what_a_kind_of_model_cannot_do_is_refused(folders):
  bert = pretrained.load(str(folders / 'bert'))
  with pytest.raises(ValueError, match='pseudo_log_probabilities'):
    evaluate.log_probabilities(bert.model, bert.params, [np.arange(5)])
  with pytest.raises(ValueError, match='writes no text'):
    signature.call(generate_script.main, model=str(folders / 'bert'), prompt='a')
  with pytest.raises(ValueError, match=r'no mask token .*<pad>'):
    tokenizers.mask_id(Bytes(('<pad>',)))
  for kind in ('bert', 't5'):
    with pytest.raises(ValueError, match=f'--model=.*{kind} is an encoder.*, and what is needed is a decoder'):
      signature.call(pretrain.experiment, model=str(folders / kind), text='no such file').open()


def test_a_file_is_scored_as_it_is(tmp_path):
  (tmp_path / 'crlf.txt').write_bytes(b'a\r\nb\r\n')
  assert text_scores.read_text(tmp_path / 'crlf.txt') == 'a\r\nb\r\n'
  for data, message in (('hello'.encode('utf-16'), 'no UTF-8 .*but UTF-16: convert it with iconv -f UTF-16'),
                        (b'caf\xe9', r'no UTF-8 \(byte 0xe9 at 3\): convert it')):
    (tmp_path / 'bad.txt').write_bytes(data)
    with pytest.raises(ValueError, match=message):
      score.score(model='none', file=tmp_path / 'bad.txt')


def test_a_text_of_one_token_without_bos_has_no_score(folders):
  with pytest.raises(ValueError, match='it has one token, and no bos before it; give --bos'):
    score.score(model=str(folders / 'gpt2'), text='b', bos=False)
