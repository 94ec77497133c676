"""The names of tasks and mixtures, and the task that a configuration makes from text files.

Names and configured tasks live here without TensorFlow; `seqio_tasks` turns them into seqio's when one is
used.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import TYPE_CHECKING

from switch_t5.data import text_to_text
from switch_t5.data.vocabularies import EXTRA_IDS
from switch_t5.errors import UserError, closest

if TYPE_CHECKING:
    import seqio

EMBEDDED_TASK = "sotu_span_corruption"
MC4_MIXTURE = "mc4"

# T5's names for its pre-training tasks, and the TFDS datasets they read.
C4_TASKS = {
    "c4_v220_span_corruption": "c4/en:2.2.0",
    "c4_v301_span_corruption": "c4/en:3.0.1",
}

# mC4's 101 languages, six of them a second time in Latin script.
MC4_DATASET = "c4/multilingual:3.0.1"
_MC4_CODES = (
    "af am ar az be bg bg-Latn bn ca ceb co cs cy da de el el-Latn en eo es et eu fa fi fil fr fy ga gd "
    "gl gu ha haw hi hi-Latn hmn ht hu hy id ig is it iw ja ja-Latn jv ka kk km kn ko ku ky la lb lo lt "
    "lv mg mi mk ml mn mr ms mt my ne nl no ny pa pl ps pt ro ru ru-Latn sd si sk sl sm sn so sq sr st su "
    "sv sw ta te tg th tr uk ur uz vi xh yi yo zh zh-Latn zu"
)
MC4_LANGUAGES = tuple(_MC4_CODES.split())

_TASK_NAME = re.compile(r"[\w.:#]+")


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Span corruption of text files; see `text_task`."""

    name: str
    pattern: str
    validation_pattern: str | None
    field: str
    merge_documents: bool


_text_tasks: dict[str, TextTask] = {}


def mc4_task(language: str) -> str:
    """Returns the name of mC4's task for a language, such as `mc4.bg_Latn` for `bg-Latn`."""
    return f"mc4.{language.replace('-', '_')}"


def text_task(
    name: str,
    pattern: str,
    validation_pattern: str | None = None,
    field: str = "text",
    merge_documents: bool = True,
) -> str:
    """Defines a span-corruption task on text files and returns its name.

    For a configuration: `MIXTURE_OR_TASK_NAME = @text_task()` and `text_task.pattern = 'essays/*.txt'`.
    Defining the same task again changes nothing.

    Args:
      name: the task's name, of letters, digits, `_`, `.`, `:` and `#`.
      pattern: a folder, a glob or a file: `.txt` files are a document each, `.jsonl` and `.jsonl.gz` one a
        line.
      validation_pattern: the same for the validation split; None holds out one document in twenty.
      field: the field of a JSON line that holds the text.
      merge_documents: whether documents are joined before they are cut to length: right for short ones.

    Raises:
      UserError: the name is malformed or stands for another task.
    """
    if not _TASK_NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be a task's name: use letters, digits and the signs _ . : # without spaces.")
    task = TextTask(name, pattern, validation_pattern, field, merge_documents)
    if name in task_names() and _text_tasks.get(name) != task:
        raise UserError(f"There is already another task called {name!r}: give text_task.name a new one.")
    _text_tasks[name] = task
    return name


def configured_text_tasks() -> tuple[TextTask, ...]:
    """Returns the tasks that `text_task` defined."""
    return tuple(_text_tasks.values())


def task_names() -> list[str]:
    """Returns all names of tasks and mixtures, sorted; loads neither TensorFlow nor seqio.

    Tasks that the user's own modules added to seqio's registries are among them.
    """
    names = {EMBEDDED_TASK, MC4_MIXTURE, *C4_TASKS, *map(mc4_task, MC4_LANGUAGES), *_text_tasks}
    names |= {*text_to_text.tasks(), *text_to_text.mixtures()}
    if "seqio" in sys.modules:
        registries = sys.modules["seqio"]
        names.update(registries.TaskRegistry.names(), registries.MixtureRegistry.names())
    return sorted(names)


def get_mixture_or_task(
    name: str, vocabulary_path: str | None = None, extra_ids: int = EXTRA_IDS
) -> seqio.Task | seqio.Mixture:
    """Returns a task or mixture that uses the given vocabulary.

    The registry's entry stays as it is; what is returned is a copy. A task that someone registered with a
    vocabulary of its own keeps it.

    Args:
      name: one of `task_names()`.
      vocabulary_path: see `vocabularies.load_vocabulary`. None takes bytes, except for C4 and mC4, where a
        forgotten vocabulary would be an expensive mistake.
      extra_ids: sentinels to add behind the vocabulary's pieces.

    Raises:
      UserError: there is no such task, or its vocabulary cannot be used.
    """
    if name not in task_names():
        # Loaded before, seqio may hold more names; not loaded, nobody can have added any.
        raise UserError(
            f"There is no task or mixture called {name!r}.{closest(name, task_names())} "
            "`switch-t5 data list` prints all names."
        )
    from switch_t5.data import seqio_tasks

    return seqio_tasks.with_vocabulary(seqio_tasks.registered(name), vocabulary_path, extra_ids)


def describe_text(provider: seqio.Task | seqio.Mixture, split: str) -> list[str]:
    """Describes the text files that a task or mixture has read; what comes from elsewhere is left out."""
    from switch_t5.data.sources import ExamplesSource, TextFilesSource
    from switch_t5.data.tensorflow_runtime import seqio

    sources = [task.source for task in seqio.get_subtasks(provider)]
    descriptions = [
        source.description(split) for source in sources if isinstance(source, TextFilesSource | ExamplesSource)
    ]
    return [description for description in descriptions if description]
