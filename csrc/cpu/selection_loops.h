// All of selection that is compiled once for each instruction set, in the order of use. Included as vector.h is.

#include "vector.h"
//
#include "prototype_tile.h"
//
#include "eight.h"
//
#include "selection_points.h"
//
#include "selection_screen.h"
//
#include "selection_boxes.h"
