"""Networks by name: :func:`create` builds one, :func:`register` adds the user's own."""

from foldbit.models import lenet as lenet
from foldbit.models import resnet as resnet
from foldbit.models.registry import architecture_of as architecture_of
from foldbit.models.registry import arguments as arguments
from foldbit.models.registry import create as create
from foldbit.models.registry import float_layers as float_layers
from foldbit.models.registry import names as names
from foldbit.models.registry import register as register
