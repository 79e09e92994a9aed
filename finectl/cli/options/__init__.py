"""The option table: every option of every stage, once, with one name and one meaning."""

from __future__ import annotations

from finectl.cli.options.analysing import *
from finectl.cli.options.building import *
from finectl.cli.options.converting import *
from finectl.cli.options.finetuning import *
from finectl.cli.options.measuring import *
from finectl.cli.options.merging import *
from finectl.cli.options.ranges import *
from finectl.cli.options.reading import *
from finectl.cli.options.running import *
from finectl.cli.options.sampling import *
from finectl.cli.options.training import *
