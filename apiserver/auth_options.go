package apiserver

import (
	"context"
	"fmt"
	"slices"
	"time"

	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/util/filesystem"
	"k8s.io/client-go/informers"
	"k8s.io/klog/v2"
	kubeauthenticator "k8s.io/kubernetes/pkg/kubeapiserver/authenticator"
	kubeauthorizer "k8s.io/kubernetes/pkg/kubeapiserver/authorizer"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"
)

const (
	// configPollPeriod is how often a configuration file is read where its changes cannot be watched, as upstream.
	configPollPeriod = time.Minute
	// reloadTimeout bounds how long the issuers of a changed configuration file may take to answer, as upstream.
	reloadTimeout = time.Minute
)

// authenticationConfig is what the options ask for, without what is knarr's own.
func authenticationConfig(o *kubeoptions.BuiltInAuthenticationOptions) (kubeauthenticator.Config, error) {
	config, err := o.ToAuthenticationConfig()
	if err != nil {
		return config, fmt.Errorf("authentication: %w", err)
	}
	config.APIServerID = serverID
	return config, nil
}

// authorizationConfig is what the options ask for.
func authorizationConfig(o *kubeoptions.BuiltInAuthorizationOptions, i informers.SharedInformerFactory) (*kubeauthorizer.Config, error) {
	config, err := o.ToAuthorizationConfig(i)
	if err != nil {
		return nil, fmt.Errorf("authorization: %w", err)
	}
	return config, nil
}

// isDefaultAuthorization reports whether Node and RBAC decide, and nobody else.
func isDefaultAuthorization(o *kubeoptions.BuiltInAuthorizationOptions) bool {
	return o.AuthorizationConfigurationFile == "" && slices.Equal(o.Modes, []string{modes.ModeNode, modes.ModeRBAC})
}

// reloader follows the file of structured authentication configuration. A file that does not hold is said in the log, and
// what held before goes on; whether anonymous requests are let in is fixed at the start, as upstream.
type reloader struct {
	options *kubeoptions.BuiltInAuthenticationOptions
	update  func(context.Context, *apiserver.AuthenticationConfiguration) error
	seen    string
}

func (r *reloader) run(ctx context.Context) {
	failed := func(err error) {
		klog.ErrorS(err, "Cannot watch the authentication configuration", "file", r.options.AuthenticationConfigFile)
	}
	filesystem.WatchUntil(ctx, configPollPeriod, r.options.AuthenticationConfigFile, func() { r.reload(ctx) }, failed)
}

func (r *reloader) reload(ctx context.Context) {
	config, err := r.options.ToAuthenticationConfig()
	if err == nil && config.AuthenticationConfigData == r.seen {
		return
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
		defer cancel()
		err = r.update(ctx, config.AuthenticationConfig)
	}
	if err != nil {
		klog.ErrorS(err, "The authentication configuration is not taken over", "file", r.options.AuthenticationConfigFile)
		return
	}
	r.seen = config.AuthenticationConfigData
}
