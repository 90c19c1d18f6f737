// A module of its own for the sake of its name: see the package's documentation. The versions are those of the project; do not tidy.
module a.knarr/early

go 1.26.6

require (
	k8s.io/client-go v0.37.1
	k8s.io/kubectl v0.0.0
)
