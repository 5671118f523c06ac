"""Small models of the kinds that people train, and what capture says about each.

Those of other libraries are rebuilt with their structure: the same functions on the same shapes.
A model returns classes on axis 1, so that one loss serves all.
"""

from tests.capture.models.attention import ATTENTION
from tests.capture.models.computed import COMPUTED
from tests.capture.models.functions import FUNCTIONS
from tests.capture.models.images import IMAGES
from tests.capture.models.language import LANGUAGE
from tests.capture.models.sequences import SEQUENCES

MODELS = LANGUAGE | ATTENTION | IMAGES | SEQUENCES | COMPUTED | FUNCTIONS
