package client

import (
	"context"

	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
)

// SystemNamespace holds the service accounts of the parts that run inside the server.
const SystemNamespace = "kube-system"

type userKey struct{}

// WithUser returns a context that says who is asking. The API pipeline's authenticator believes it without further proof, so it must only
// be set by code that has authenticated the caller by other means (or is the caller).
func WithUser(ctx context.Context, u user.Info) context.Context {
	return context.WithValue(ctx, userKey{}, u)
}

// UserFrom returns the caller set by [WithUser]; false when the request did not come from inside the process.
func UserFrom(ctx context.Context) (user.Info, bool) {
	u, ok := ctx.Value(userKey{}).(user.Info)
	return u, ok && u != nil
}

// ServiceAccount is the identity of the part name: the service account of that name in kube-system, with the groups that its token would
// carry. Upstream's bootstrap policy binds its controllers' roles to these.
func ServiceAccount(name string) user.Info {
	return &user.DefaultInfo{
		Name: serviceaccount.MakeUsername(SystemNamespace, name),
		Groups: []string{
			serviceaccount.AllServiceAccountsGroup,
			serviceaccount.MakeNamespaceGroupName(SystemNamespace),
			user.AllAuthenticated,
		},
	}
}

// User is the identity of a part that upstream runs with a certificate and not with a service account (system:kube-scheduler,
// system:apiserver): name, the given groups and system:authenticated.
func User(name string, groups ...string) user.Info {
	return &user.DefaultInfo{Name: name, Groups: append(append([]string(nil), groups...), user.AllAuthenticated)}
}
