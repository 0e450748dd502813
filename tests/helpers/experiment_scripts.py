"""The scripts of the experiments, and flags of each."""
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
# By name: the experiments and the benchmarks, without what the benchmarks share, and the command line of another
# program.
SCRIPTS = {path.stem: path for folder in ('experiments', 'experiments/benchmarks')
           for path in sorted((ROOT / folder).glob('*.py'))
           if path.stem not in ('interleaved', 'served_models', 'harness')}
# Flags that make each experiment tiny.
TINY = {
    'pretrain': ['--text={folder}/*.txt', '--tokenizer_kind=bytes', '--vocab=320', '--length=16', '--layers=1',
                 '--width=16', '--heads=2', '--batch=8', '--steps=2', '--warmup=1', '--evaluate_every=1',
                 '--evaluate_batches=1'],
    'finetune_chat': ['--layers=1', '--width=16', '--heads=2', '--batch=8', '--steps=2', '--warmup=1'],
    'customer_service': ['--vocab=400', '--length=512', '--layers=1', '--width=16', '--heads=2', '--batch=8',
                         '--steps=2', '--warmup=1'],
    'summarise': ['--jsonl={folder}/summaries.jsonl', '--vocab=400', '--length=64', '--layers=1', '--width=16',
                  '--heads=2', '--batch=8', '--steps=2', '--warmup=1'],
    'preference': ['--length=64', '--batch=8', '--steps=2', '--warmup=1'],
    'distill': ['--teacher={folder}/teacher', '--text={folder}/*.txt', '--length=16', '--width=16', '--batch=8',
                '--steps=2'],
    'denoise': ['--steps=2', '--vocab=600', '--length=32', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
    'learned_metric': ['--steps=2', '--patience=1', '--vocab=600', '--length=64', '--layers=1', '--width=16',
                       '--heads=2', '--batch=8'],
    'infill': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
    'diffusion': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
    'overfit': ['--steps=2', '--documents=8', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2',
                '--batch=8', '--dropout=0.1', '--subword_sampling=0.1', '--token_dropout=0.1'],
    'mup': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=32', '--batch=8'],
    'quickstart': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
}
# What a tool is asked for beside --help: flags that it must understand.
TOOLS = {
    'generate': ['--prompt=def ', '--temperature=0.5', '--stop=a,b', '--draft=1'],
    'score': ['--text=something', '--source=some', '--best'],
    'serve': ['--port=0', '--rows=2', '--cors=https://example.org'],
    'import_hf': ['--model=a/b', '--out=/nowhere'],
    'doctor': ['--workdir=/nowhere', '--best', '--mesh=fsdp:1', '--coordinator_address=host:1', '--process_id=1'],
    'copy_run': ['--workdir=/nowhere', '--out=gs://bucket/run', '--step=3'],
    'proof': ['--meshes=fsdp:8; fsdp:4,tensor:2', '--steps=3', '--num_processes=2', '--heartbeat=9'],
    'mesh_costs': ['--steps=3'],
    'start_up': ['--restarts=2'],
    'export_hf': ['--workdir=/nowhere', '--out=/nowhere/else', '--dtype=bfloat16'],
    'tfds_builder': ['--text=*.txt', '--data_dir=/nowhere', r'--separator=\n\n'],
    'noise_scale': ['--batches=8', '--rows=4', '--best'],
    'training': [],
    'bleurt_scores': ['--number=8', '--batch=4'],
    'checkouts': ['--other=/nowhere', '--rounds=2'],
    'objective_costs': ['--only=distillation', '--shape=tiny'],
    'optimizer_costs': ['--only=soap', '--shape=tiny'],
    'chaos': ['--kills=3', '--places=1x8,2x4', '--move'],
    'schedules': ['--only=steps', '--milestones=3,4'],
    'compare': ['--arms=a: ; b: lr=1', '--equal=flops'],
    'optimizers': ['--seeds=2'],
    'sweep': ['--knobs=lr=1,2', '--method=random'],
    'scaling': ['--budgets=1,2'],
    'evaluate': ['--workdir=/nowhere', '--suite=suite.json'],
    'scoring': ['--families=gpt2,bert,t5'],
    'decoding': ['--new_tokens=4'],
    'importing': ['--rounds=1'],
    'checkpoint_stall': ['--width=64', '--saves=1'],
    'harness_requests': ['--rounds=1', '--width=64'],
    'server_throughput': ['--clients=2', '--rounds=1', '--other=http://localhost:1/v1'],
    'server_soak': ['--minutes=0.2', '--clients=2', '--disconnects=0.5'],
    'temperatures': ['--temperatures=0.5,1', '--limit=8', '--best'],
    'classify': ['--classes=a= good,b= bad', '--jsonl=x.jsonl', '--label_key=class', '--limit=none'],
    'customer_tools': ['--address=http://localhost:1/v1', '--model=m', '--dialogues=2', '--key_variable=none'],
    'code_generation': ['--model=gpt2', '--problems=a.jsonl', '--limit=2', '--execute_code', '--k=1'],
    'contamination': ['--items=x.jsonl', '--jsonl=*.jsonl', '--item_keys=question,choices', '--most_documents=none'],
    'score_texts': ['--candidates=a.jsonl,b.jsonl', '--references=r.txt', '--metrics=bleu,rouge', '--stem',
                    '--bleurt=/nowhere', '--bert_score=/nowhere', '--use_idf'],
    'compare_outputs': ['--outputs=a.jsonl,new=b.jsonl', '--references=c.txt,d.txt', '--metrics=chrf', '--lowercase'],
    'judge': ['--outputs=a.jsonl,new=b.jsonl', '--address=http://localhost', '--model=judge', '--votes=votes.csv'],
    'human_eval': ['--outputs=a.jsonl,new=b.jsonl', '--mode=likert', '--criteria=fluency,relevance', '--raters=3'],
}
