"""Rewards are the same in any batch, for pairs as training computes them, and choose the best of several answers."""
import dataclasses
import json

import export_hf
import generate as generate_script
import jax
import numpy as np
import pytest
import score

from lm import load, sharding, signature
from lm.data.chat import conversation, dialogues, messages
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import rewards
from lm.models import reward, transformer
from lm.objectives import preference
from lm.objectives.next_token import next_token

TOKENS = Bytes()
PAIRS = [json.dumps({'prompt': f'q{i}', 'chosen': 'yes ' * (i % 4 + 1), 'rejected': 'no' * i}) for i in range(1, 10)]
MODEL = reward.Reward(transformer.llama(TOKENS.vocab_size, 16, 1, 2, max_length=64))


@dataclasses.dataclass(frozen=True)
class Run:
  """A run with the members that rewards need."""
  data: dialogues.Dialogues
  objective: object = preference.reward()
  batch: int = 4


@pytest.fixture(scope='module')
def judge():
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype('f4'),
                          jax.eval_shape(MODEL.init, jax.random.key(0)))
    yield rewards.Judge(MODEL, params, TOKENS, conversation.Turns())


@pytest.fixture
def opened(judge, tmp_path, monkeypatch):
  """Returns what `load.open_trained` gives for a folder: the reward model, or a decoder of the same data."""
  source = Source('pairs', {'train': [PAIRS[0].replace('q1', 'other')], 'validation': PAIRS}, 'p')
  data = dialogues.Dialogues(source, TOKENS, 64, preference.Pair)
  runs = {'reward': load.TrainedModel(Run(data), MODEL, judge.params, TOKENS, 1, tmp_path, {}),
          'decoder': load.TrainedModel(Run(data, next_token()), MODEL.decoder, judge.params['decoder'], TOKENS, 1,
                                     tmp_path, {})}
  monkeypatch.setattr(load, 'open_trained', lambda workdir, best=False, check=None: runs[workdir.name])
  monkeypatch.setattr(load.TrainedModel, 'open_data', lambda self: data.open(tmp_path, lambda line: None))
  return tmp_path


def test_a_reward_is_the_score_at_the_last_token_in_any_batch(judge):
  texts = [np.random.default_rng(n).integers(0, 256, n).astype('i4') for n in (3, 40, 64, 1, 17, 16)]
  together = rewards.rewards(MODEL, judge.params, texts, positions=64)
  # Causal, so padding has no effect.
  rows = reward.Batch(np.stack([np.pad(text, (0, 64 - len(text))) for text in texts]))
  scores = np.asarray(jax.jit(MODEL.apply)(judge.params, rows).scores)
  np.testing.assert_allclose(together, [row[len(text) - 1] for text, row in zip(texts, scores)], atol=1e-4)
  for bad in ([], range(65)):
    with pytest.raises(ValueError, match=f'texts of {len(bad)} to .*reads 1 to 64 tokens'):
      rewards.rewards(MODEL, judge.params, [np.array(bad, 'i4')])


def test_pairs_and_a_split_are_scored_alike_and_there_is_no_text_in_it(judge, opened, capsys):
  scores = judge.pairs(PAIRS, messages.Keys())
  assert 0 < scores.accuracy < 1
  (opened / 'pairs.jsonl').write_text('\n'.join(PAIRS))
  score.score(workdir=opened / 'reward', pairs=f'{opened}/pairs.jsonl', mesh='fsdp:8')
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1] == f'9 pairs: {scores.accuracy:.1%} right, margin {scores.margin:.4f}'
  assert sum('wrong' in line for line in lines) == sum(scores.chosen <= scores.rejected)
  score.score(workdir=opened / 'reward', split='validation', mesh='fsdp:8')
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('validation: all 1 batches of 8 rows of 64 positions')
  metrics = dict(line.split() for line in lines if len(line.split()) == 2)
  assert float(metrics['preference/accuracy']) == pytest.approx(scores.accuracy, abs=1e-4)
  assert float(metrics['preference/margin']) == pytest.approx(scores.margin, abs=2e-3)
  assert not {'bits_per_byte', 'perplexity', 'nll'} & set(metrics)


def test_pairs_that_are_too_long_are_left_out_and_counted(judge, opened, capsys):
  path, long = opened / 'pairs.jsonl', [PAIRS[0].replace('yes', 'y' * 99), PAIRS[1].replace('nono', 'n' * 99)]
  expected = judge.pairs(PAIRS, messages.Keys())
  path.write_text('\n\n'.join([*PAIRS[:5], long[0], *PAIRS[5:]]))   # every second line is empty
  score.score(workdir=opened / 'reward', pairs=str(path), mesh='fsdp:8')
  lines = capsys.readouterr().out.splitlines()
  assert f'9 pairs: {expected.accuracy:.1%} right, margin {expected.margin:.4f}' == lines[-1]
  assert lines[0].startswith(f'warning: 1 of 10 pairs are left out, longer than the 64 tokens that the model reads at '
                             f'once; the first is {path}:11')
  path.write_text('\n'.join([long[1], PAIRS[0]]))
  with pytest.raises(ValueError, match=rf'1 of 2 pairs .* {path}:1; .*--allow_left_out'):
    score.score(workdir=opened / 'reward', pairs=str(path), mesh='fsdp:8')
  score.score(workdir=opened / 'reward', pairs=str(path), mesh='fsdp:8', allow_left_out=True)
  assert '\n1 pairs: ' in capsys.readouterr().out
  path.write_text('\n'.join(long))
  with pytest.raises(ValueError, match='none of 2 pairs'):
    score.score(workdir=opened / 'reward', pairs=str(path), mesh='fsdp:8', allow_left_out=True)


def test_texts_of_a_file_that_are_empty_or_too_long_are_left_out_and_counted(judge, opened, capsys):
  path, texts = opened / 'texts.jsonl', ['yes', '', 'no', 'y' * 99, *['yes'] * 6]
  path.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  score.score(workdir=opened / 'reward', jsonl=str(path), mesh='fsdp:8')
  lines = capsys.readouterr().out.splitlines()
  assert any(f'1 of 10 texts are left out, as they are empty; the first is {path}:2' in line for line in lines)
  assert any(f'1 of 9 texts are left out, longer than the 64 tokens that the model reads at once; the first is {path}:4'
             in line for line in lines)
  expected = judge.answers([''] * 8, [text for text in texts if text and len(text) < 9])
  assert [line.split()[0] for line in lines[-8:]] == [f'{value:.4f}' for value in expected]
  path.write_text(json.dumps({'text': 'y' * 99}))
  with pytest.raises(ValueError, match='1 of 1 texts .*longer than|none of 1 texts'):
    score.score(workdir=opened / 'reward', jsonl=str(path), mesh='fsdp:8')


def test_a_reward_model_is_not_exported_and_the_message_says_why(opened, tmp_path):
  with pytest.raises(ValueError, match='reward model'):
    export_hf.main(workdir=opened / 'reward', out=tmp_path / 'out')


def test_a_text_has_the_reward_of_an_answer_to_its_source(judge, opened, capsys):
  expected = judge.answers(['q1', ''], ['yes', 'yes'])
  for source, value in zip(('q1', None), expected):
    score.score(workdir=opened / 'reward', text='yes', source=source, mesh='fsdp:8')
    assert capsys.readouterr().out.splitlines()[-1].split() == [f'{value:.4f}', "'yes'"]
  assert expected[0] != expected[1]
  with pytest.raises(ValueError, match='--pairs is for reward models'):
    score.score(workdir=opened / 'decoder', pairs='x', mesh='fsdp:8')


@pytest.mark.slow
def test_the_best_of_several_is_what_the_reward_model_prefers(judge, opened, capsys):
  options = {'workdir': opened / 'decoder', 'prompt': 'q1', 'max_tokens': 6, 'mesh': 'fsdp:8', 'chat': True}
  signature.call(generate_script.main, options, n=8)
  answers = capsys.readouterr().out.removesuffix('\n').split(f'\n\n{"-" * 80}\n')
  signature.call(generate_script.main, options, n=2, best_of=8, reward=opened / 'reward')
  shown = capsys.readouterr()
  values = judge.answers(['q1'] * 8, answers)
  assert shown.out.split(f'\n\n{"-" * 80}\n')[0] == answers[int(np.argmax(values))]
  assert [line.split()[1].rstrip(',') for line in shown.err.splitlines()] == [
      f'{value:.4f}' for value in sorted(values, reverse=True)[:2]]
  for wrong, message in (({'best_of': 8}, 'give both flags'), ({'reward': opened / 'reward'}, 'give both flags'),
                         ({'best_of': 2, 'n': 3, 'reward': opened / 'reward'}, 'at least --n=3')):
    with pytest.raises(ValueError, match=message):
      signature.call(generate_script.main, options, **wrong)
  with pytest.raises(ValueError, match='is a reward model, which generates no text'):
    signature.call(generate_script.main, {**options, 'workdir': opened / 'reward'})
  with pytest.raises(ValueError, match='what is needed is a reward model'):
    signature.call(generate_script.main, options, best_of=2, reward=opened / 'decoder')
