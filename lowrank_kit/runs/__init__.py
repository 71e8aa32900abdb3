"""What a run leaves behind: its directory, its manifest, its metrics in a tracker."""
