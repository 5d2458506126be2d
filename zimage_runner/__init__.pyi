from zimage_runner.api import Drawn as Drawn
from zimage_runner.api import Item as Item
from zimage_runner.api import Loaded as Loaded
from zimage_runner.api import Run as Run
from zimage_runner.api import load as load
from zimage_runner.api import run as run
from zimage_runner.errors import UserError as UserError

__version__: str
GB: float
