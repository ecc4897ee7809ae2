"""From one device to a cluster: Mesh (which ranks there are), Rules (which dim lies on which axis), and what follows."""
from .mesh import Mesh as Mesh
from .rules import Rules as Rules
from .rules import make_rules as make_rules
from .schedules import Pipeline as Pipeline
