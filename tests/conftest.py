"""Being here, this file puts the folder of tests on the path, so that `contracts` can be imported from every room."""
