"""Runs probes on a run, and prints a line for each finding."""
from collections.abc import Callable, Mapping

import jax

from lm.doctor import (
  arithmetic,
  cached_decoding,
  compile_counts,
  dataset_figures,
  gradients,
  labels,
  machine,
  optimizer_table,
  texts,
  visibility,
)
from lm.doctor.findings import DoesNotApply, Finding, Verdict
from lm.doctor.subject import Subject

Probe = Callable[[Subject], Finding]

# By the names of the lines. Those that start every run take seconds: they share two programs of a few short rows.
START: Mapping[str, Probe] = {
    'documents apart': visibility.documents_apart,
    'no future': visibility.no_future,
    'past is seen': visibility.past_is_seen,
    'answers hidden': visibility.answers_hidden,
    'labels': labels.labels_shifted_once,
    'targets': labels.targets_alone_are_trained,
    'chat mask': texts.mask_covers_answers,
    'padding': gradients.padding_has_no_gradient,
    'parameters': gradients.parameters_have_gradients,
    'accumulation': gradients.accumulation_in_use,
    'initial loss': arithmetic.loss_at_initialisation,
    'attention kernel': arithmetic.attention_kernel,
    'compiles once': compile_counts.state_keeps_its_types,
    'tokenizer': texts.tokenizer_round_trips,
    'padding share': dataset_figures.padding_share,
    'cut examples': dataset_figures.cut_examples,
    'epochs': dataset_figures.epochs,
    'devices': machine.devices,
    'host': machine.host,
    'settings': machine.settings,
}
ALL: Mapping[str, Probe] = {
    **START,
    'accumulation': gradients.accumulation,
    'compiles once': compile_counts.step_compiles_once,
    'sharding': gradients.sharded_equals_single,
    'cache': cached_decoding.cache_equals_forward,
    'one model': cached_decoding.sampler_scorer_trainer_agree,
    'duplicates': dataset_figures.duplicates,
    'versions': machine.versions,
    'optimizer': optimizer_table.optimizer_table,
}


def examine(subject: Subject, probes: Mapping[str, Probe]) -> dict[str, Finding]:
  """Returns the finding of each probe. A probe that fails is skipped with the reason."""
  findings = {}
  for name, probe in probes.items():
    try:
      findings[name] = probe(subject)
    except DoesNotApply as reason:
      findings[name] = Finding(Verdict.SKIPPED, str(reason))
    except Exception as error:   # a fault of a probe must not end a run
      findings[name] = Finding(Verdict.WARNING, f'could not be examined: {type(error).__name__}: '
                               + str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
  return findings


def line(name: str, finding: Finding) -> str:
  """Returns the line of a finding: its verdict, its name, what was measured."""
  return f'{finding.verdict.value:8} {name:17} {finding.text}'


def show(findings: Mapping[str, Finding], seconds: float) -> None:
  """Prints all findings, and how many have which verdict."""
  if jax.process_index():
    return
  for name, finding in findings.items():
    print(line(name, finding))
    for row in finding.table:
      print(f'{"":26} {row}')
  counts = {verdict: sum(finding.verdict is verdict for finding in findings.values()) for verdict in Verdict}
  print(', '.join(f'{count} {verdict.value}' for verdict, count in counts.items()) + f'; {seconds:.1f} s')


def has_fault(findings: Mapping[str, Finding]) -> bool:
  """Returns whether any finding is a fault."""
  return any(finding.verdict is Verdict.FAULT for finding in findings.values())
