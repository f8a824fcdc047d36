"""Integration of velocity fields in time: `dispatch.solve` takes any solver by its name."""
