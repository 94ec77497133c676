"""Text in, batches of tokens out: sources, vocabularies, tasks and the resumable iterator.

Importing this package, or `pipeline`, `documents`, `lengths` and `vocabularies`, loads neither TensorFlow nor
seqio: the modules that need them (`sources`, `span_corruption`, `seqio_tasks`) take them from
`tensorflow_runtime` and are imported inside functions.
"""
