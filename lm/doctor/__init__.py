"""The doctor: short experiments that show whether a run does what it says."""
from lm.doctor.findings import Finding, Verdict
from lm.doctor.probes import ALL, START, examine, has_fault, show
from lm.doctor.starts import Fault, check_start, diagnose, opened
from lm.doctor.subject import Subject

__all__ = ['Finding', 'Verdict', 'ALL', 'START', 'examine', 'has_fault', 'show', 'Fault', 'check_start', 'diagnose',
           'opened', 'Subject']
