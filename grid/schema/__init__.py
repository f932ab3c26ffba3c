"""The words and columns of a results directory: what a run writes and a board reads.

DIR holds ``rows/ samples/ stages/ attempts/ trials/`` as Parquet, where exhibits were asked for
``fits/ rocs/ features/ pictures/``, in ``imported/`` what others measured, and ``grid.json``.
Writers only ever add files, under a scratch name that is renamed when complete; of several rows of
one (cell, eval_set, metric) the newest ``written_at`` wins. Nothing heavy is imported here.
"""
