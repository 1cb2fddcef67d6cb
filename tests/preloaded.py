"""What a fork server loads once for the processes that a test starts: the compiled rasteriser, which takes a second in
each process that draws."""

import torch
from flux4d.raster import Splats
from flux4d.compiled_code import have_numba
from flux4d.raster_compiled import draw_tiles, undraw_tiles

SIDE = 16  # px

torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
if have_numba():
    values = torch.tensor([[8.0, 8.0]]), torch.tensor([[0.1, 0.0, 0.1]]), torch.tensor([0.5])
    shown = torch.ones(1, 4)
    drawn = draw_tiles(Splats(None, *values, None), shown, SIDE, SIDE)
    undraw_tiles(drawn, torch.ones(SIDE * SIDE, 4), (*values, shown))
